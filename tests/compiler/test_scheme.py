import pytest

from compiler.errors import RecipeError
from compiler.scheme import Scheme, Schemes, parse_scheme


@pytest.mark.parametrize(
    "text", ["int4-g32", "int4-g64-asym", "int8-g128", "int8", "int8-stored", "int8-dynamic", "int8-dynamic-vnni", "int8-rows", "fp32", "fp16"]
)
def test_every_word_reads_back(text):
    assert str(parse_scheme(text)) == text


@pytest.mark.parametrize("text", ["int4", "int9-g32", "int4-g48", "auto ", "int4-g32-foo", ""])
def test_unknown_words_name_the_known(text):
    with pytest.raises(RecipeError, match=r"quantize.scheme: expected int[4B]-gN.*choose one"):
        parse_scheme(text)


def test_last_matching_override_wins():
    body, head = Scheme(4, 32, True, "nbits"), Scheme(8, 32, True, "nbits")
    schemes = Schemes(body, {"model.layers.*": head, "model.layers.1.*": body, "lm_head": head})
    assert schemes.of("model.layers.0.mlp.down_proj") == head
    assert schemes.of("model.layers.1.mlp.down_proj") == body
    assert schemes.of("model.embed_tokens") == body
