"""An S3 server on this machine (moto's), for tests of object stores."""

import contextlib
import json
import os

import pytest

from tests.support.optional import installed

PACKAGES = ("upath", "s3fs", "moto", "flask")

needs_s3 = pytest.mark.skipif(
    not all(map(installed, PACKAGES)), reason=f"one of {', '.join(PACKAGES)} is not installed"
)
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server():
    """Yields the environment in which a process finds the server, and has it in its own."""
    import s3fs
    from moto.server import ThreadedMotoServer

    # fsspec keeps file systems by their arguments, and one of an earlier server would be found.
    s3fs.S3FileSystem.clear_instance_cache()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield environment
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()


def make_bucket(name, read_only=False):
    """A bucket of the server; a read-only one refuses every write."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    if read_only:
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": ["s3:PutObject", "s3:DeleteObject"],
            "Resource": f"arn:aws:s3:::{name}/*",
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        client.put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
