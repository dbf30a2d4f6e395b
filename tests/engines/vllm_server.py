"""`vllm serve` with our connector, in the environment of `scripts/engines.sh vllm`: says where it listens, and ends
with its standard input."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request


def main() -> None:
    settings, transfer = json.loads(sys.argv[1]), sys.argv[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "model"]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", settings["model"], "--served-model-name=tiny-kv",
        "--enforce-eager", "--host=127.0.0.1", f"--port={port}", f"--kv-transfer-config={transfer}", *options,
    ]  # fmt: skip
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if server.poll() is not None:
                sys.exit(f"vllm serve ended: {server.returncode}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        print(json.dumps({"url": url}), flush=True)
        sys.stdin.read()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
