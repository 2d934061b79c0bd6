"""The text that the reference model is trained and measured on: four domains found in any installation."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError

DOMAIN_LIMIT_BYTES = 2_000_000
DOMAIN_MINIMUM_BYTES = 150_000
HELD_OUT_SHARE = 1 / 8
# Shorter paragraphs recur by nature (`else:`, `return x`); dropping them would tear the text.
DEDUPLICATED_PARAGRAPH_BYTES = 64
# Dependencies of moeroute itself: installing anything else leaves the corpus, and so the trained model, as it was.
LICENSED_PACKAGES = (
    "networkx",
    "numba",
    "numpy",
    "pyarrow",
    "pydantic",
    "scipy",
    "sympy",
    "torch",
)

Use = Literal["record", "measure"]
_HALVES: tuple[Use, Use] = ("record", "measure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text by domain, as bytes, split into a training and a held-out part.

    `train` and `held_out` hold one uint8 array a domain. The parts share no document, and no paragraph of
    `DEDUPLICATED_PARAGRAPH_BYTES` or more. `left_out` says which optional domains this installation lacks.
    `digest` identifies all of it.
    """

    domains: tuple[str, ...]
    train: tuple[NDArray[np.uint8], ...]
    held_out: tuple[NDArray[np.uint8], ...]
    left_out: tuple[str, ...]
    digest: str

    def sequences(self, count: int, length: int, seed: int, *, use: Use) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Cut `count` sequences of held-out text: (bytes [count, length], domain [count]).

        No two overlap, and domains take turns, so any run of them has each domain alike. Each `use` has its own half
        of the text, so that no policy is judged on text it was tuned on. Errors: `InputError` where a domain holds too
        little of it.
        """
        random = np.random.default_rng(seed)
        domain_N = (np.arange(count) % len(self.domains)).astype(np.uint8)
        text_NS = np.empty((count, length), dtype=np.uint8)
        for domain, held_out in enumerate(self.held_out):
            text = np.array_split(held_out, 2)[_HALVES.index(use)]
            of_domain_N = domain_N == domain
            wanted, blocks = int(of_domain_N.sum()), text.size // length
            if wanted > blocks:
                raise InputError(
                    f"{count} sequences of {length} bytes need {wanted} of {self.domains[domain]}; its held-out text "
                    f"to {use} has {blocks}: ask for at most {blocks * len(self.domains)}"
                )
            block_N = random.permutation(blocks)[:wanted]
            text_NS[of_domain_N] = text[: blocks * length].reshape(blocks, length)[block_N]
        return text_NS, domain_N


def load_corpus() -> Corpus:
    """Read the corpus of this installation.

    `code` is the standard library, `cpp` torch's headers; both must be there. `english`, the help topics of pydoc,
    and `legal`, the licences of moeroute's dependencies, are left out where they are too small.
    Errors: `InputError` where `code` or `cpp` holds less than `DOMAIN_MINIMUM_BYTES`.
    """
    domains, parts, left_out = [], [], []
    for domain, required, documents in (
        ("code", True, _files(Path(sysconfig.get_paths()["stdlib"]), "*.py")),
        ("english", False, _help_topics()),
        ("cpp", True, _torch_headers()),
        ("legal", False, _licences()),
    ):
        train, held_out = split(documents)
        size_bytes = train.size + held_out.size
        if size_bytes >= DOMAIN_MINIMUM_BYTES:
            domains.append(domain)
            parts.append((train, held_out))
            continue
        shortage = f"{domain}: {size_bytes} bytes of text are installed, {DOMAIN_MINIMUM_BYTES} are needed"
        if required:
            raise InputError(f"corpus domain {shortage}; is this installation of Python and torch whole?")
        left_out.append(shortage)
    digest = hashlib.sha256()
    for domain, part in zip(domains, parts, strict=True):
        for side, text in zip(("train", "held_out"), part, strict=True):
            digest.update(f"{domain} {side} {text.size}\n".encode())
            digest.update(text.tobytes())
    return Corpus(
        domains=tuple(domains),
        train=tuple(train for train, _ in parts),
        held_out=tuple(held_out for _, held_out in parts),
        left_out=tuple(left_out),
        digest=digest.hexdigest(),
    )


def split(documents: Iterable[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Split documents into (training bytes, held-out bytes), at most `DOMAIN_LIMIT_BYTES` together.

    Documents go in the order of their hash; the first of them, `HELD_OUT_SHARE` of the bytes, are held out.
    A paragraph seen before is dropped, so that the same text never sits on both sides.
    """
    by_hash = {hashlib.sha256(document).digest(): document for document in documents}
    total_bytes = min(sum(map(len, by_hash.values())), DOMAIN_LIMIT_BYTES)
    seen: set[bytes] = set()
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    taken_bytes = 0
    for _, document in sorted(by_hash.items()):
        if taken_bytes >= total_bytes:
            break
        side = sides[taken_bytes < HELD_OUT_SHARE * total_bytes]
        side.extend(_unseen(document[: total_bytes - taken_bytes], seen))
        taken_bytes += len(document)
    train, held_out = (np.frombuffer(b"".join(side), dtype=np.uint8) for side in sides)
    return train, held_out


def _unseen(document: bytes, seen: set[bytes]) -> Iterator[bytes]:
    for paragraph in document.replace(b"\r\n", b"\n").split(b"\n\n"):
        if len(paragraph) >= DEDUPLICATED_PARAGRAPH_BYTES:
            fingerprint = hashlib.sha256(b" ".join(paragraph.split())).digest()
            if fingerprint in seen:
                continue
            seen.add(fingerprint)
        yield paragraph + b"\n\n"


def _files(root: Path, *patterns: str) -> Iterator[bytes]:
    paths = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        yield path.read_bytes()


def _help_topics() -> Iterator[bytes]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the documentation apart
        return
    for _, text in sorted(topics.items()):
        yield text.encode()


def _torch_headers() -> Iterator[bytes]:
    found = importlib.util.find_spec("torch")
    for folder in found.submodule_search_locations or () if found else ():
        # ATen's generated headers are one template repeated thousands of times.
        yield from _files(Path(folder) / "include", "c10/**/*.h", "torch/csrc/**/*.h", "ATen/*.h", "ATen/core/*.h")


def _licences() -> Iterator[bytes]:
    for package in LICENSED_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            in_metadata = file.parts[0].endswith(".dist-info")
            if in_metadata and any(word in str(file).upper() for word in ("LICEN", "NOTICE", "COPYING")):
                yield Path(str(file.locate())).read_bytes()
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), "LICENSE*")
