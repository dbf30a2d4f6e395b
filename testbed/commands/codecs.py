"""`kvstream codec ...`: list, encode, decode, inspect, calibrate and measure codecs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import SpecError

if TYPE_CHECKING:
    from testbed.llm import Model


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    codec = subparsers.add_parser("codec", help="list, encode, decode, inspect, calibrate and measure codecs")
    commands = codec.add_subparsers(dest="codec_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="every codec")
    listed.set_defaults(run=list_command)

    encode = commands.add_parser("encode", help="encode one chunk of a context's KV cache into a file")
    encode.add_argument("context", help="a shipped context or a JSON file")
    encode.add_argument("output", help="the file to write")
    _codec_arguments(encode)
    encode.add_argument("--level", type=int, default=0, help="0 is the smallest (default)")
    encode.add_argument("--chunk", type=int, default=0, help="which chunk of the context (default: the first)")
    encode.add_argument("--chunk-tokens", type=int, default=256, help="tokens a chunk (default: 256)")
    encode.set_defaults(run=encode_command)

    decode = commands.add_parser("decode", help="decode a chunk into a safetensors file with the tensor 'kv'")
    decode.add_argument("file", help="an encoded chunk")
    decode.add_argument("output", help="the file to write: kv [layers, 2, tokens, heads, head_dim]")
    _codec_arguments(decode)
    decode.set_defaults(run=decode_command)

    inspect = commands.add_parser("inspect", help="what an encoded chunk holds, section by section")
    inspect.add_argument("file", help="an encoded chunk")
    inspect.add_argument("--json", action="store_true", help="print as JSON")
    inspect.set_defaults(run=inspect_command)

    calibrate = commands.add_parser("calibrate", help="fit a codec's profile to a model")
    calibrate.add_argument("model", help="folder or name of a causal language model, or 'bundled'")
    calibrate.add_argument("--codec", default="kvstream", help="the codec (default: kvstream)")
    calibrate.add_argument("--output", metavar="FILE", help="also write the profile here")
    calibrate.set_defaults(run=calibrate_command)

    bench = commands.add_parser("bench", help="size, distortion and speed of every level, codec beside codec")
    bench.add_argument("codecs", nargs="*", default=["kvstream", "cachegen", "artifact", "uniform"])
    bench.add_argument("--model", default="bundled", help="folder or name of a causal language model")
    bench.add_argument("--chunk-tokens", type=int, default=256, help="tokens a chunk (default: 256)")
    bench.add_argument("--json", action="store_true", help="print as JSON")
    bench.set_defaults(run=bench_command)


def _codec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codec", default="kvstream", help="the codec with settings (default: kvstream)")
    parser.add_argument("--model", default="bundled", help="folder or name of the model whose cache it is")


def _model(name: str) -> Model:
    from testbed.llm import Model

    return Model.load(None if name == "bundled" else name)


def list_command(args: argparse.Namespace) -> int:
    import inspect

    from codec import registry

    for name in registry.names():
        cls = registry.codec_class(name)
        module = inspect.getmodule(cls)
        about = (inspect.getdoc(module) or "").split("\n")[0]
        print(f"{name:<10} {'calibrated ' if cls.needs_profile else '           '} {about}")
    return 0


def encode_command(args: argparse.Namespace) -> int:
    from testbed import calibrate, prepare
    from testbed.llm import calculate_kv

    model = _model(args.model)
    codec = calibrate.make_codec(args.codec, model, print)
    (context,) = prepare.find_contexts([args.context])
    tokens = model.encode(context.text.decode())
    start = args.chunk * args.chunk_tokens
    if not 0 <= start < len(tokens):
        raise SpecError(f"chunk {args.chunk} is beyond the {len(tokens)} tokens of {context.name}")
    span = range(start, min(start + args.chunk_tokens, len(tokens)))
    kv = calculate_kv(model, tokens[: span.stop])[:, :, span.start :]
    data = codec.encode(kv, args.level, positions=span)
    Path(args.output).write_bytes(data)
    print(f"{args.output}: {len(data)} bytes, {len(data) * 8 / kv.numel():.3f} bit/element")
    return 0


def decode_command(args: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import save_file

    from testbed import calibrate

    codec = calibrate.make_codec(args.codec, _model(args.model), print)
    kv = codec.decode(Path(args.file).read_bytes())
    assert isinstance(kv, torch.Tensor)
    save_file({"kv": kv.contiguous()}, args.output)
    print(f"{args.output}: kv {list(kv.shape)} {str(kv.dtype).removeprefix('torch.')}")
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    from codec import container

    facts = container.inspect(Path(args.file).read_bytes())
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key, value in facts.items():
        if key == "sections":
            for tag, size in value.items():
                print(f"  section {tag}: {size} bytes, {size * 8 / facts['total_bytes'] / 8:.1%} of the chunk")
        else:
            print(f"{key}: {value}")
    return 0


def calibrate_command(args: argparse.Namespace) -> int:
    from testbed import calibrate

    model = _model(args.model)
    profile = calibrate.profile_of(args.codec, model, print)
    print(f"profile {profile.sha256} of {args.codec} for {model.name}: {len(profile.to_bytes())} bytes")
    if args.output:
        Path(args.output).write_bytes(profile.to_bytes())
        print(args.output)
    return 0


def bench_command(args: argparse.Namespace) -> int:
    from testbed import codec_bench

    rows = codec_bench.measure(_model(args.model), args.codecs, args.chunk_tokens, lambda line: None)
    print(json.dumps(rows, indent=1) if args.json else codec_bench.text(rows))
    return 0
