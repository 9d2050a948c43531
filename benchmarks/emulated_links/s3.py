"""An S3 server (moto's) at the hub of a star: the bucket at which peers meet.

python s3.py ADDRESS      makes the bucket `swarm`, says "ready", serves until it is killed
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.emulated_links.star import Star

PORT, BUCKET = 5000, "swarm"
# The server looks at no signature, and clients refuse to make none.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}


def serve_s3(net: Star) -> str:
    """Start the server at the hub; the URL of a prefix in its bucket. `CREDENTIALS` are then in
    this process's environment, and so in that of those that it starts.
    """
    os.environ.update(CREDENTIALS)
    address = net.address("hub")
    command = [sys.executable, __file__, address]
    server = net.run("hub", command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    if server.stdout.readline() != "ready\n":
        raise RuntimeError("moto's S3 server did not start: pip install 'moto[server]'")
    return f"s3://{BUCKET}/run?endpoint=http://{address}:{PORT}&region=us-east-1"


def main() -> None:
    """Serve."""
    from moto.server import ThreadedMotoServer

    address = sys.argv[1]
    ThreadedMotoServer(address, PORT, verbose=False).start()
    made = urllib.request.Request(f"http://{address}:{PORT}/{BUCKET}", method="PUT")
    urllib.request.urlopen(made).close()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
