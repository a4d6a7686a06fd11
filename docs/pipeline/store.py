"""A server of S3's protocol on this machine, with a bucket: `python docs/pipeline/store.py FILE`.

Writes a file of shell variables by which clients find it, and stays until it is ended. What it is
given is in its memory alone: it stands for the object store that you have.
"""

import logging
import os
import sys
import time
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "clicks"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}


def main(file: Path) -> None:
    """Starts it, and waits."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    variables = CREDENTIALS | {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
    }
    os.environ.update(variables)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    lines = [f"export {name}={value}" for name, value in variables.items()]
    beside = file.with_suffix(".new")  # renamed into place, as a shell waits for the whole of it
    beside.write_text("\n".join([*lines, f"STORE=s3://{BUCKET}", ""]))
    beside.rename(file)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
