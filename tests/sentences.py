"""The sentences with which the command line ends, and what tests ask of them."""

import re


class Sentence(str):
    """What follows "moe-engine: " on standard error. code: that of the error; None for one of click's."""

    code = None


def sentence_of(err, error=None):
    """The one line of standard error."""
    found = re.fullmatch(r"moe-engine: (\S.*)\n", err)
    assert found is not None, err
    sentence = Sentence(found[1])
    sentence.code = getattr(error, "code", None)
    return sentence


def check(sentence, *words, code=None):
    """The sentence names the words, and its error has the code, where one is given; how it is put is free."""
    assert [word for word in words if str(word) not in sentence] == [], sentence
    assert code in (None, sentence.code), f"{sentence.code!r}: {sentence}"
