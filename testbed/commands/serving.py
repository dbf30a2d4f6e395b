"""`kvstream serve`, `store` and `fetch`: the sender, its store and one session, without an emulated link."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstream.testbed import terminal
from kvstream.testbed.commands.arguments import chosen_profile, count, output_file, port, profile_arguments, size
from kvstream.testbed.commands.codecs import tried
from kvstream.testbed.errors import SpecError

if TYPE_CHECKING:
    from kvstream.testbed.net.sender import Sender

QUOTA: Final = "most that contexts may take, such as 500GB; after a put, those used longest ago go"
MAX_SHOWN: Final = 20


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = subparsers.add_parser("serve", help="serve stored contexts over HTTP")
    serve.add_argument(
        "store", nargs="?",
        help="folder or URL (s3://bucket/prefix) of a store (default: the one that kvstream store fills); "
        "--writable creates it if needed",
    )  # fmt: skip
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: loopback)")
    serve.add_argument("--port", type=port, default=8700, help="port to bind (default: 8700)")
    serve.add_argument("--writable", action="store_true", help="allow uploads")
    serve.add_argument("--quota", type=size, metavar="SIZE", help=QUOTA)
    serve.add_argument("--certificate", type=Path, help="serve HTTPS with this certificate (PEM, with its chain)")
    serve.add_argument("--key", type=Path, help="the certificate's private key (PEM)")
    serve.add_argument("--json", action="store_true", help="print one JSON line once it listens")
    serve.set_defaults(run=serve_command)

    store = subparsers.add_parser("store", help="encode contexts, or caches from elsewhere, into a store")
    store.add_argument("contexts", nargs="*", help="names of shipped contexts, or JSON files")
    store.add_argument(
        "--kv", action="append", default=[], type=Path, metavar="FILE",
        help="a cache instead: safetensors with kv [layers, 2, tokens, heads, head_dim] and token_ids; repeatable",
    )  # fmt: skip
    store.add_argument(
        "--to", metavar="STORE", help="the store's folder or URL, s3://bucket/prefix (default: the one kvstream serves)"
    )
    store.add_argument("--quota", type=size, metavar="SIZE", help=QUOTA)
    store.add_argument(
        "--codec", action="append", help="a codec, with settings, or ./mine.py:Class; repeatable (default: kvstream)"
    )
    store.add_argument(
        "--model", help="folder or name of the model (default: bundled; with --kv, the fingerprint that the file gives)"
    )
    store.add_argument("--chunk-tokens", type=count, default=256, help="tokens per chunk (default: 256)")
    profile_arguments(store)
    store.add_argument("--json", action="store_true", help="print as JSON")
    store.set_defaults(run=store_command)

    fetch = subparsers.add_parser("fetch", help="fetch a context's cache from a sender and continue a prompt after it")
    fetch.add_argument("url", help="the sender's URL, such as http://127.0.0.1:8700")
    fetch.add_argument("context", help="a context's id, or its name where only one is called so")
    fetch.add_argument("--policy", default="kvstream", help="a policy, with settings (default: kvstream)")
    fetch.add_argument("--codec", metavar="FILE:CLASS", help="the context's codec, where that is from a file")
    fetch.add_argument("--deadline", default="1s", help="TTFT deadline (default: 1s)")
    fetch.add_argument("--model", help="folder or name of the context's model (default: bundled)")
    fetch.add_argument("--prompt", help="text to continue after the context")
    fetch.add_argument("--tokens", type=int, default=32, help="tokens to generate (default: 32)")
    fetch.add_argument(
        "--output", type=output_file, metavar="FILE",
        help="write the cache to a safetensors file instead of continuing a prompt: needs no model",
    )  # fmt: skip
    fetch.add_argument("--json", action="store_true", help="print the session as JSON")
    fetch.set_defaults(run=fetch_command)


def serve_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.encoding.prepare import default_store
    from kvstream.testbed.net import sender

    store = args.store or default_store()
    if args.store is None and not args.writable and not default_store().is_dir():
        raise SpecError("nothing is stored yet: run kvstream store docs, or give the folder of a store")
    in_words = functools.partial(_announce, "http" if args.certificate is None else "https")
    announce = sender.announce_json if args.json else in_words
    tls = sender.tls_of(args.certificate, args.key)
    sender.run(store, args.host, args.port, writable=args.writable, quota_bytes=args.quota, announce=announce, tls=tls)
    return 0


def _announce(scheme: str, sender: Sender, contexts: Sequence[str], host: str, port: int) -> None:
    """Where contexts are served, which, and how to fetch one."""
    from kvstream.testbed.store.names import shortest_name

    address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    print(f"serving {terminal.many(len(contexts), 'context')} of {sender.store.path} at {address}")
    for context in contexts[:MAX_SHOWN]:
        manifest = sender.cache.known(context)
        facts = f": {manifest.tokens} tokens, {terminal.many(len(manifest.levels), 'level')}" if manifest else ""
        print(f"  {context}{facts}")
    if len(contexts) > MAX_SHOWN:
        print(f"  and {len(contexts) - MAX_SHOWN} more")
    if contexts:
        terminal.say(f"fetch one: kvstream fetch {address} {shortest_name(contexts[0], contexts)}")
    sys.stdout.flush()


def store_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.encoding import prepare
    from kvstream.testbed.encoding.store_file import store_file
    from kvstream.testbed.run import progress
    from kvstream.testbed.store import shift
    from kvstream.testbed.store.opening import open_store

    def say(line: str) -> None:
        terminal.say(line, error=args.json)

    if bool(args.contexts) == bool(args.kv):
        raise SpecError("give contexts to encode, or caches with --kv FILE; one of the two")
    opened = open_store(args.to or prepare.default_store(), quota_bytes=args.quota)
    codecs = args.codec or ["kvstream"]
    for codec in codecs:
        tried(codec)
    chosen = {"profile": chosen_profile(args), "force": args.force}
    ids: dict[tuple[str, str], str] = {}
    if args.contexts:
        model = args.model or "bundled"
        ids |= prepare.prepare(
            model, args.contexts, codecs, args.chunk_tokens, say, opened, track=progress.track, **chosen
        ).ids
    for file in args.kv:
        stored = store_file(file, args.model, codecs, args.chunk_tokens, opened, say, **chosen)
        ids |= {(str(file), codec): identifier for codec, identifier in stored.items()}
    manifests = {pair: opened.manifest(key) for pair, key in ids.items()}
    if args.json:
        found = shift.facts(manifests)
        rows = [
            {"context": context, "codec": codec, "id": key} | found.get(context, {}).get(codec, {})
            for (context, codec), key in ids.items()
        ]
        print(json.dumps({"store": str(opened.path), "contexts": rows}, indent=1))
        return 0
    print(f"store: {opened.path}")
    for pair, identifier in ids.items():
        about = manifests[pair].shift
        print(f"  {pair[0]} with {pair[1]}: {identifier}" + (f"; {about}" if about else ""))
    terminal.say(f"serve it: kvstream serve{f' {args.to}' if args.to else ''}")
    return 0


def fetch_command(args: argparse.Namespace) -> int:
    from kvstream.testbed.receiver import answer
    from kvstream.traces.units import parse_time

    deadline_s = parse_time(args.deadline)
    if args.codec:
        tried(args.codec)
    if args.output is not None:
        if args.model or args.prompt:
            raise SpecError("--output writes the cache and continues nothing: omit --model and --prompt")
        return _fetch_to_file(args, deadline_s)
    result = answer.fetch_answer(
        args.url, args.context, args.policy, deadline_s, args.model or "bundled", args.prompt or "", args.tokens
    )
    print(json.dumps(result.to_json(), indent=1)) if args.json else terminal.say(result.describe())
    return 0


def _fetch_to_file(args: argparse.Namespace, deadline_s: float) -> int:
    from dataclasses import asdict

    import torch

    from kvstream.testbed.receiver.fetch import fetch
    from kvstream.testbed.session.record import SessionFailed
    from kvstream.testbed.store.kv_file import write_kv_file

    try:
        got = fetch(args.url, args.context, args.policy, deadline_s)
    except SessionFailed as error:
        raise SpecError(str(error)) from error
    kv, manifest, record = got.cache, got.manifest, got.record
    assert isinstance(kv, torch.Tensor)
    levels = " ".join(map(str, record.levels))
    more = {"context": manifest.context, "levels": levels, "distortion": f"{record.distortion:g}"}
    write_kv_file(args.output, kv, got.token_ids, manifest.model, more)
    dtype = str(kv.dtype).removeprefix("torch.")
    if args.json:
        facts = {"file": str(args.output), "model": manifest.model, "shape": list(kv.shape), "dtype": dtype}
        print(json.dumps({**asdict(record), "met": record.met, **facts}, indent=1))
        return 0
    print(f"complete after {record.describe()}")
    print(f"{args.output}: kv {list(kv.shape)} {dtype} and token_ids, of model {manifest.model[:12]}")
    return 0
