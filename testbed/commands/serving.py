"""`kvstream serve` and `fetch`: the sender and one session, without an emulated link."""

from __future__ import annotations

import argparse
import json
import sys

from testbed.commands.arguments import count, port


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = subparsers.add_parser("serve", help="serve stored contexts over HTTP")
    serve.add_argument("store", help="folder of a store; with --writable it is made if it is not there")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: loopback)")
    serve.add_argument("--port", type=port, default=8700, help="port to bind (default: 8700)")
    serve.add_argument("--writable", action="store_true", help="allow uploads")
    serve.set_defaults(run=serve_command)

    store = subparsers.add_parser("store", help="encode contexts with codecs into a store")
    store.add_argument("contexts", nargs="+", help="names of shipped contexts, or JSON files")
    store.add_argument("--codec", action="append", help="a codec with settings; repeatable (default: kvstream)")
    store.add_argument("--model", default="bundled", help="folder or name of a causal language model")
    store.add_argument("--chunk-tokens", type=count, default=256, help="tokens a chunk (default: 256)")
    store.add_argument("--json", action="store_true", help="print as JSON")
    store.set_defaults(run=store_command)

    fetch = subparsers.add_parser("fetch", help="fetch a context's cache from a sender and answer its first question")
    fetch.add_argument("url", help="the sender, as in http://127.0.0.1:8700")
    fetch.add_argument("context", help="id of a context (GET /v1/contexts lists them)")
    fetch.add_argument("--policy", default="cachegen")
    fetch.add_argument("--deadline", default="1s", help="TTFT deadline (default: 1s)")
    fetch.add_argument("--model", default="bundled", help="folder or name of the model the context was made with")
    fetch.add_argument("--prompt", default="", help="text to continue after the context")
    fetch.add_argument("--tokens", type=int, default=32, help="tokens to generate (default: 32)")
    fetch.add_argument("--json", action="store_true", help="print the session as JSON")
    fetch.set_defaults(run=fetch_command)


def serve_command(args: argparse.Namespace) -> int:
    from testbed import sender

    arguments = ["--store", args.store, "--host", args.host, "--port", str(args.port)]
    return int(sender.main([*arguments, *(["--writable"] if args.writable else [])]) or 0)


def store_command(args: argparse.Namespace) -> int:
    from testbed import prepare

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    prepared = prepare.prepare(args.model, args.contexts, args.codec or ["kvstream"], args.chunk_tokens, say)
    if args.json:
        ids = [{"context": context, "codec": codec, "id": key} for (context, codec), key in prepared.ids.items()]
        print(json.dumps({"store": str(prepared.path), "contexts": ids}, indent=1))
        return 0
    print(f"store: {prepared.path}")
    for (context, codec), identifier in prepared.ids.items():
        print(f"  {context} with {codec}: {identifier}")
    return 0


def fetch_command(args: argparse.Namespace) -> int:
    from testbed import fetching
    from traces.units import parse_time

    result = fetching.fetch(
        args.url, args.context, args.policy, parse_time(args.deadline), args.model, args.prompt, args.tokens
    )
    print(json.dumps(result.to_json(), indent=1) if args.json else result.describe())
    return 0
