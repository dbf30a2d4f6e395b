"""A real S3 server on loopback, in a process of its own (moto's): `S3Server.begin()`, or as a program."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.pages import ROOT

KEYS = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class S3Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    @classmethod
    def begin(cls, log: Path) -> S3Server:
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.testbed.s3_server"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        assert process.stdout is not None
        url = next(line.strip() for line in process.stdout if line.startswith("http://"))
        return cls(process, url, log)

    @property
    def environment(self) -> dict[str, str]:
        return KEYS | {"AWS_ENDPOINT_URL": self.url}

    def requests(self) -> list[str]:
        """All that were answered since the beginning, such as `GET /bucket/key?x=1`."""
        return re.findall(r'"(?:\x1b\[\d+m)*([A-Z]+ \S+) HTTP', self.log.read_text(errors="replace"))

    def end(self) -> None:
        self.process.communicate("\n", timeout=30)


def main() -> None:
    from moto.server import ThreadedMotoServer

    logging.basicConfig(level=logging.INFO)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main()
