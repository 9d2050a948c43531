"""Models: one decoder, many families; weights in and out of Hugging Face's layout."""
