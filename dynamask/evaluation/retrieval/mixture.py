"""Training text that teaches retrieval: plain documents with retrieval examples between them."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dynamask.data.sources import Document
from dynamask.data.tokenizer import encode_text
from dynamask.errors import InvalidInputError
from dynamask.evaluation.retrieval.haystack import Haystack
from dynamask.evaluation.retrieval.tasks import TASKS, least_length, make_example

_RECENT = 16
"""Documents the haystacks are taken from: those that came last, so that the stream is never held as a whole."""


def mixture(
    documents: Iterable[Document],
    tokenizer: Any,
    share: float,
    seed: int,
    *,
    lengths: tuple[int, int] = (512, 1024),
    tasks: Sequence[str] = tuple(TASKS),
) -> Iterator[Document]:
    """Yield all documents in their order, and between them retrieval examples, question and answer included.

    A model trained on text alone meets a few long-range copies in a thousand tokens; a small one does not learn to
    retrieve from so few. Half of the examples have a haystack of noise, in which nothing but the needle is worth
    keeping, half one of the documents just seen.

    Args:
        documents: plain texts, as `dynamask.data.documents` gives them.
        tokenizer: measures both kinds of text; train with the same one (`tokenizer=FOLDER`).
        share: share of the mixture's *tokens* that are retrieval examples, 0 <= share < 1.
        seed: the same mixture for the same seed and documents.
        lengths: least and greatest tokens of an example; drawn evenly on a logarithmic scale. Keep them well below
            the training context: documents are packed end to end, and a block's edge cuts what stands across it.
        tasks: names in `TASKS`, each as likely.

    Yields:
        Documents; the examples are named "retrieval/TASK/NUMBER". `evaluate_retrieval` draws its own from other seeds,
        whatever the number given to both.

    Raises:
        InvalidInputError: a share or lengths out of range, an unknown task, or lengths too short for one. The call
            itself raises them, before a document is read.
    """
    if not 0 <= share < 1:
        raise InvalidInputError(f"share is the retrieval examples' part of all tokens, from 0 to below 1; got {share}")
    shortest, longest = lengths
    if not 0 < shortest <= longest:
        raise InvalidInputError(f"lengths are the least and the greatest of an example; got {lengths}")
    if not tasks:
        raise InvalidInputError(f"give at least one task: {', '.join(TASKS)}")
    for task in tasks:
        least = least_length(task, tokenizer)
        if shortest < least:
            raise InvalidInputError(
                f"examples of {task} need {least} tokens with this tokenizer; got lengths {lengths}: make the least "
                "greater, or leave the task out"
            )
    return _mixed(documents, tokenizer, share, seed, (math.log(shortest), math.log(longest)), tasks)


def _mixed(
    documents: Iterable[Document],
    tokenizer: Any,
    share: float,
    seed: int,
    log_lengths: tuple[float, float],
    tasks: Sequence[str],
) -> Iterator[Document]:
    rng = random.Random(f"mixture {seed}")
    noise = Haystack(tokenizer)
    recent: deque[str] = deque(maxlen=_RECENT)

    def draw_length() -> int:
        return round(math.exp(rng.uniform(*log_lengths)))

    # Drawn before it is due: drawn anew for every document, lengths would come out short, as long ones wait longest.
    owed, number, length = 0.0, 0, draw_length()
    for document in documents:
        yield document
        recent.append(document.text)
        tokens = len(encode_text(tokenizer, document.text))
        owed += tokens * share / (1 - share)
        texts: Haystack | None = None  # tokenised once per document, and only where an example is due
        while owed >= length:
            if rng.random() < 0.5:
                haystack = noise
            else:
                texts = texts or Haystack(tokenizer, list(recent), max_tokens=4 * round(math.exp(log_lengths[1])))
                haystack = texts
            task = rng.choice(list(tasks))
            example = make_example(task, tokenizer, length, rng.random(), f"mixture {seed} {number}", haystack=haystack)
            text = tokenizer.decode(example.prompt + example.answer, skip_special_tokens=True)
            yield Document(f"retrieval/{task}/{number}", text)
            owed -= length
            number, length = number + 1, draw_length()
