"""Cut a GGUF model's vocabulary down to the tokens that a study uses, so that it fits through a narrow transfer.

    python lab/scripts/restrict_vocabulary.py MODEL.gguf DATA OUT --tokenizer FOLDER --size 65536

DATA holds token arrays of the whole vocabulary, as `conversion_data.py` writes them. Kept are: every token of the
arrays and the haystack, the bytes, the pieces that a user defined, the control tokens that have a name, every piece
that those are merged from, and the pieces of the lowest ids, which were merged first, up to the size. The rows of the
embedding are copied as they are quantised, so the model computes the same, but its output distribution lacks the other
tokens. OUT receives the smaller GGUF file, its tokenizer, and DATA with new ids; the script ends with an error if the
smaller tokenizer splits any text of the data in another way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import AutoTokenizer

from dynamask.data.gguf_tokenizer import CONTROL, NORMAL, read_gguf_tokenizer
from dynamask.evaluation.retrieval import words

LISTS = ("tokens", "scores", "token_type")
EMBEDDING = "token_embd.weight"
CHECKED = 100_000
"""Tokens of each array whose text is split again."""


def steps(token: str, ids: dict[str, int], scores: list[float]) -> set[int]:
    """The ids of the pieces that a token is merged from, step by step."""
    pieces = list(token)
    found = {ids[piece] for piece in pieces if piece in ids}
    while len(pieces) > 1:
        unions = [(scores[ids[a + b]], -place) for place, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not unions:
            break
        place = -max(unions)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        found.add(ids[pieces[place]])
    return found


def chosen(tokens: list[str], scores: list[float], kinds: list[int], used: set[int], size: int) -> list[int]:
    """The ids to keep, ascending."""
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] == NORMAL}
    named = {i for i, kind in enumerate(kinds) if kind == CONTROL and "unused" not in tokens[i]}
    other = {i for i, kind in enumerate(kinds) if kind not in (CONTROL, NORMAL)}
    kept = used | named | other
    kept |= {each for i in list(kept) if kinds[i] == NORMAL for each in steps(tokens[i], ids, scores)}
    if len(kept) > size:
        raise SystemExit(f"the data use {len(kept)} tokens, more than {size}: give a larger --size")
    for index, kind in enumerate(kinds):
        if len(kept) == size:
            break
        if kind == NORMAL:
            kept.add(index)
    return sorted(kept)


def write_gguf(reader: GGUFReader, target: Path, kept: list[int]) -> None:
    """Copy the file with fewer tokens."""
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    renumbered = {old: new for new, old in enumerate(kept)}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, sub = field.contents(), field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        if name in {f"tokenizer.ggml.{each}" for each in LISTS}:
            value = [value[index] for index in kept]
        elif name.startswith("tokenizer.ggml.") and name.endswith("_token_id"):
            value = renumbered[int(value)]
        writer.add_key_value(name, value, field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        data = tensor.data[kept] if tensor.name == EMBEDDING else tensor.data
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", type=int, default=1 << 16)
    arguments = parser.parse_args()
    reader = GGUFReader(str(arguments.gguf))
    tokens, scores, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in LISTS)
    full: Any = AutoTokenizer.from_pretrained(arguments.tokenizer)
    arrays = {path.stem: np.load(path) for path in sorted(arguments.data.glob("*.npy"))}
    essays = (arguments.data / "essays.txt").read_text(encoding="utf-8")
    listed = [value for value in vars(words).values() if isinstance(value, (tuple, list))]
    names = [word for value in listed for word in value if isinstance(word, str)]
    texts = [essays, *names, *(f" {name}" for name in names), *map(str, range(10)), *"abcdefghijklmnopqrstuvwxyz"]
    used = {int(index) for array in arrays.values() for index in np.unique(array)}
    used |= {index for text in texts for index in full(text, verbose=False)["input_ids"]}
    kept = chosen(tokens, scores, kinds, used, arguments.size)
    arguments.output.mkdir(parents=True, exist_ok=True)
    small = arguments.output / f"{arguments.gguf.stem}-{arguments.size}.gguf"
    write_gguf(reader, small, kept)
    made: Any = read_gguf_tokenizer(small)
    made.save_pretrained(arguments.output / "tokenizer")
    table = np.full(len(tokens), -1, dtype=np.int64)
    table[kept] = np.arange(len(kept))
    report = json.loads((arguments.data / "data.json").read_text())
    for name, array in arrays.items():
        new = table[array].astype(np.uint16 if len(kept) <= 1 << 16 else np.uint32)
        np.save(arguments.output / f"{name}.npy", new)
        report["arrays"][name]["sha256"] = hashlib.sha256(new.tobytes()).hexdigest()[:16]
        text = full.decode(array.reshape(-1)[:CHECKED].tolist())
        wanted = table[full(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if not np.array_equal(wanted, made(text, add_special_tokens=False, verbose=False)["input_ids"]):
            raise SystemExit(f"{name}: the smaller tokenizer splits its text in another way")
    for name in ("separator", "begin"):
        report[name] = table[report[name]].tolist()
    report["vocabulary"] = {"kept": len(kept), "of": len(tokens), "used": len(used)}
    (arguments.output / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    shutil.copy(arguments.data / "essays.txt", arguments.output / "essays.txt")
    print(f"{small}: {len(kept)} of {len(tokens)} tokens, {len(used)} used, {small.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
