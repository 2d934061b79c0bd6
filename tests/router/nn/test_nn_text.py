import numpy as np
import pytest

from router.nn.text import DEDUPLICATED_PARAGRAPH_BYTES, Corpus, load_corpus, split
from traces.errors import InputError


def paragraphs(text: np.ndarray) -> set[bytes]:
    parts = (b" ".join(part.split()) for part in text.tobytes().split(b"\n\n"))
    return {part for part in parts if len(part) >= DEDUPLICATED_PARAGRAPH_BYTES}


def test_the_corpus_is_the_same_each_time(corpus: Corpus) -> None:
    assert load_corpus().digest == corpus.digest
    assert {"code", "cpp"} <= set(corpus.domains)


def test_no_paragraph_is_in_both_parts(corpus: Corpus) -> None:
    for train, held_out in zip(corpus.train, corpus.held_out, strict=True):
        assert paragraphs(held_out)
        assert paragraphs(train).isdisjoint(paragraphs(held_out))


def test_a_document_that_is_there_twice_is_read_once() -> None:
    documents = [f"{number} ".encode() * 100 for number in range(40)]
    once, twice = split(documents), split(documents[::-1] * 2)
    assert all(np.array_equal(a, b) for a, b in zip(once, twice, strict=True))
    assert 0.1 < once[1].size / (once[0].size + once[1].size) < 0.2


def test_sequences_do_not_overlap_and_domains_take_turns(corpus: Corpus) -> None:
    text_NS, domain_N = corpus.sequences(40, 64, seed=3, use="record")
    domains = len(corpus.domains)
    assert domain_N.tolist() == [index % domains for index in range(40)]
    assert len({row.tobytes() for row in text_NS}) == 40
    assert np.array_equal(text_NS, corpus.sequences(40, 64, seed=3, use="record")[0])
    assert not np.array_equal(text_NS, corpus.sequences(40, 64, seed=4, use="record")[0])
    for text_S, domain in zip(text_NS, domain_N, strict=True):
        assert text_S.tobytes() in corpus.held_out[domain].tobytes()


def test_more_sequences_than_the_text_gives_are_refused(corpus: Corpus) -> None:
    with pytest.raises(InputError, match="ask for at most"):
        corpus.sequences(10**6, 64, seed=0, use="record")


def test_what_is_recorded_and_what_is_measured_share_no_text() -> None:
    digits = np.arange(100, dtype=np.uint8)
    corpus = Corpus(domains=("digits",), train=(digits,), held_out=(digits,), left_out=(), digest="")
    recorded, measured = (
        set(corpus.sequences(5, 10, seed=0, use=use)[0].ravel().tolist()) for use in ("record", "measure")
    )
    assert recorded == set(range(50))
    assert measured == set(range(50, 100))
