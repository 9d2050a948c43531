"""What a run tells afterwards: its records, figures, charts and one HTML page. No torch here."""
