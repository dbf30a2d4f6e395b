"""`kvstream codec ...`: list, encode, decode, inspect, calibrate and measure codecs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.commands.arguments import output_file
from testbed.errors import MachineError, SpecError

if TYPE_CHECKING:
    from testbed.llm import Model


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    codec = subparsers.add_parser("codec", help="list, encode, decode, inspect, calibrate and measure codecs")
    commands = codec.add_subparsers(dest="codec_command", metavar="COMMAND", required=True)

    listed = commands.add_parser("list", help="every codec")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    listed.set_defaults(run=list_command)

    encode = commands.add_parser("encode", help="encode one chunk of a context's KV cache into a file")
    encode.add_argument("context", help="a shipped context or a JSON file")
    encode.add_argument("output", type=output_file, help="the file to write")
    _codec_arguments(encode)
    encode.add_argument("--level", type=int, default=0, help="0 is the smallest (default)")
    encode.add_argument("--chunk", type=int, default=0, help="which chunk of the context (default: the first)")
    encode.add_argument("--chunk-tokens", type=int, default=256, help="tokens a chunk (default: 256)")
    encode.set_defaults(run=encode_command)

    decode = commands.add_parser("decode", help="decode a chunk into a safetensors file with the tensor 'kv'")
    decode.add_argument("file", help="an encoded chunk")
    decode.add_argument("output", type=output_file, help="the file to write: kv [layers, 2, tokens, heads, head_dim]")
    _codec_arguments(decode)
    decode.set_defaults(run=decode_command)

    inspect = commands.add_parser("inspect", help="what an encoded chunk holds, section by section")
    inspect.add_argument("file", help="an encoded chunk")
    inspect.add_argument("--codec", help="the codec with settings that wrote it (default: what the chunk says)")
    inspect.add_argument("--profile", metavar="FILE", help="the profile it needs (default: found by its hash)")
    inspect.add_argument("--json", action="store_true", help="print as JSON")
    inspect.set_defaults(run=inspect_command)

    calibrate = commands.add_parser("calibrate", help="fit a codec's profile to a model")
    calibrate.add_argument("model", help="folder or name of a causal language model, or 'bundled'")
    calibrate.add_argument("--codec", default="kvstream", help="the codec (default: kvstream)")
    calibrate.add_argument("--output", metavar="FILE", type=output_file, help="also write the profile here")
    calibrate.add_argument("--fresh", action="store_true", help="fit again, also where a profile was kept")
    _device_argument(calibrate)
    calibrate.add_argument("--json", action="store_true", help="print as JSON")
    calibrate.set_defaults(run=calibrate_command)

    bench = commands.add_parser("bench", help="size, distortion and speed of every level, codec beside codec")
    bench.add_argument("codecs", nargs="*", default=["kvstream", "cachegen", "artifact", "uniform"])
    bench.add_argument("--model", default="bundled", help="folder or name of a causal language model")
    bench.add_argument("--chunk-tokens", type=int, default=256, help="tokens a chunk (default: 256)")
    _device_argument(bench)
    bench.add_argument("--figure", metavar="FILE", type=output_file, help="draw rate against distortion: SVG, PNG, PDF")
    bench.add_argument("--json", action="store_true", help="print as JSON")
    bench.set_defaults(run=bench_command)

    insight = commands.add_parser("insight", help="the CacheGen paper's three observations, measured on a model")
    insight.add_argument("model", help="folder or name of a causal language model, or 'bundled'")
    insight.add_argument("--figure", metavar="FILE", type=output_file, help="draw them: SVG, PNG or PDF")
    insight.add_argument("--json", action="store_true", help="print as JSON")
    insight.set_defaults(run=insight_command)


def _codec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codec", default="kvstream", help="the codec with settings (default: kvstream)")
    parser.add_argument("--model", default="bundled", help="folder or name of the model whose cache it is")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def _device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", help="where the model runs and chunks are coded: cpu (default) or cuda"
    )


def _say(line: str) -> None:
    """What the user waits for; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def _model(name: str, device: str = "cpu") -> Model:
    import torch

    from testbed.llm import Model

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MachineError(f"--device {device}: torch cannot use it here; leave it out to use the CPU") from error
    return Model.load(None if name == "bundled" else name, device=device)


def list_command(args: argparse.Namespace) -> int:
    import inspect

    from codec import registry

    found = [
        {
            "name": name,
            "calibrated": cls.needs_profile,
            "about": (inspect.getdoc(inspect.getmodule(cls)) or "").split("\n")[0],
        }
        for name, cls in ((name, registry.codec_class(name)) for name in registry.names())
    ]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for row in found:
        print(f"{row['name']:<10} {'calibrated ' if row['calibrated'] else '           '} {row['about']}")
    return 0


def encode_command(args: argparse.Namespace) -> int:
    from testbed import calibrate, prepare
    from testbed.llm import calculate_kv

    model = _model(args.model)
    codec = calibrate.make_codec(args.codec, model, _say)
    (context,) = prepare.find_contexts([args.context])
    tokens = model.encode(context.text.decode())
    start = args.chunk * args.chunk_tokens
    if not 0 <= start < len(tokens):
        raise SpecError(f"chunk {args.chunk} is beyond the {len(tokens)} tokens of {context.name}")
    span = range(start, min(start + args.chunk_tokens, len(tokens)))
    kv = calculate_kv(model, tokens[: span.stop])[:, :, span.start :]
    data = codec.encode(kv, args.level, positions=span)
    args.output.write_bytes(data)
    rate = len(data) * 8 / kv.numel()
    facts = {
        **{"file": str(args.output), "context": context.name, "tokens": [span.start, span.stop]},
        **{"codec": args.codec, "level": args.level, "bytes": len(data), "bits_per_element": rate},
    }
    print(json.dumps(facts, indent=1) if args.json else f"{args.output}: {len(data)} bytes, {rate:.3f} bit/element")
    return 0


def decode_command(args: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import save_file

    from testbed import calibrate

    codec = calibrate.make_codec(args.codec, _model(args.model), _say)
    kv = codec.decode(Path(args.file).read_bytes())
    assert isinstance(kv, torch.Tensor)
    save_file({"kv": kv.contiguous()}, args.output)
    facts = {"file": str(args.output), "shape": list(kv.shape), "dtype": str(kv.dtype).removeprefix("torch.")}
    print(json.dumps(facts, indent=1) if args.json else "{file}: kv {shape} {dtype}".format(**facts))
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    from codec import container, registry
    from codec.profile import Profile
    from testbed import calibrate
    from testbed.plugs import codec_spec

    data = Path(args.file).read_bytes()
    facts = container.inspect(data)
    name, settings = codec_spec(args.codec or facts["codec"])
    needed = facts["profile_sha256"]
    profile = Profile.load(args.profile) if args.profile else needed and calibrate.known_profile(needed)
    if profile is not None or needed is None:
        facts = registry.make(name, settings, profile).describe(data)
    print(json.dumps(facts, indent=1) if args.json else _described(facts))
    if profile is None and needed is not None and not args.json:
        print(f"bits by layer and entropy need profile {needed[:12]}: give it with --profile")
    return 0


def _described(facts: dict[str, Any]) -> str:
    """A chunk's facts as lines of text."""
    lines = []
    for key, value in facts.items():
        if key == "sections":
            lines += [f"  section {t}: {size} bytes, {size / facts['total_bytes']:.1%}" for t, size in value.items()]
        elif key == "bits_by_layer":
            lines.append("coded symbols, bit per element:")
            lines.append(f"  {'layer':<6} {'keys':>7} {'values':>7}")
            lines += [f"  {layer:<6} {keys:>7.3f} {values:>7.3f}" for layer, (keys, values) in enumerate(value)]
        elif key == "ideal_bits_per_element":
            over = facts["bits_per_element"] / value - 1
            lines.append(f"entropy of the coder's model: {value:.4f} bit per element; the chunk takes {over:+.1%}")
        else:
            lines.append(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
    return "\n".join(lines)


def calibrate_command(args: argparse.Namespace) -> int:
    from testbed import calibrate, progress

    model = _model(args.model, args.device)
    profile = calibrate.profile_of(args.codec, model, _say, progress.track, fresh=args.fresh)
    data = profile.to_bytes()
    if args.output:
        args.output.write_bytes(data)
    facts = {
        **{"profile_sha256": profile.sha256, "codec": args.codec, "model": model.name, "bytes": len(data)},
        "file": str(args.output) if args.output else None,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print("profile {profile_sha256} of {codec} for {model}: {bytes} bytes".format(**facts))
    if args.output:
        print(args.output)
    return 0


def bench_command(args: argparse.Namespace) -> int:
    from testbed import codec_bench, codec_figures

    if args.figure:
        codec_figures.check_path(args.figure)
    model = _model(args.model, args.device)
    rows = codec_bench.measure(model, args.codecs, args.chunk_tokens, lambda line: None)
    torchac = codec_bench.torchac(model, args.chunk_tokens)
    body = {"levels": rows, "torchac": torchac}
    print(json.dumps(body, indent=1) if args.json else codec_bench.text(rows, torchac))
    if args.figure:
        codec_figures.rate_distortion(rows, args.figure)
    return 0


def insight_command(args: argparse.Namespace) -> int:
    from testbed import codec_figures, insight, progress

    if args.figure:
        codec_figures.check_path(args.figure)
    found = insight.measure(_model(args.model), progress.track)
    print(json.dumps(found.to_json(), indent=1) if args.json else insight.text(found))
    if args.figure:
        codec_figures.insight(found, args.figure)
    return 0
