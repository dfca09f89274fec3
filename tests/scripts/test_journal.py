"""The state of a run on disk: whatever happens to its bytes is one line that says what to do, or changes nothing."""

import io

import pytest
import torch

from scripts.common.journal import read_state

KINDS = {"settings": dict, "policies": dict, "costs": None}


def as_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture
def state():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {"network": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}
    return {"settings": {"seed": 0, "vocab_size": 8}, "costs": None, "policies": {"0.1": saved}}


@pytest.fixture
def whole(state):
    return as_bytes(state)


@pytest.fixture
def outcome(whole, tmp_path):
    """outcome(content) writes the file and reads it -> "refused", "as saved" or "altered"."""

    def outcome(content):
        path = tmp_path / "state.pt"
        path.unlink(missing_ok=True)  # the last one may still be mapped
        path.write_bytes(content)
        try:
            return "as saved" if as_bytes(read_state(path, KINDS)) == whole else "altered"
        except ValueError as error:
            assert str(error).startswith(f"{path} is not what this program writes, or is damaged (")
            assert "restore or delete it" in str(error) and "\n" not in str(error)
            return "refused"

    return outcome


def test_a_bit_that_flips_anywhere_is_noticed_or_means_nothing(whole, outcome):
    assert outcome(whole) == "as saved"
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        assert outcome(flipped) != "altered", at


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (b"vocab_size", b"vocab_shze"),  # a setting of another name
        (b"param_groups", b"param_grouqs"),
        (b"FloatStorage", b"FloatStorbge"),
        (b"ctorch\nFloatStorage", b"ccollections\nOrdere"),  # torch asks a class that is no storage for its dtype
        (b"(X\x07\x00\x00\x00storage", b"\x88X\x07\x00\x00\x00storage"),  # a reference to a tensor that is no tuple
        (b"archive/data/1", b"archive\ndata/1"),
    ],
)
def test_damage_that_torch_does_not_expect_is_refused(whole, outcome, part, other):
    assert part in whole
    assert outcome(whole.replace(part, other)) == "refused"


def test_half_a_file_and_the_file_of_another_program_are_refused(whole, outcome, state):
    for content in (b"", b"mine", whole[: len(whole) // 2], whole[100:], whole[:-1]):
        assert outcome(content) == "refused"
    for content in ({"settings": {}}, {**state, "policies": []}, [1, 2], 3):
        assert outcome(as_bytes(content)) == "refused"
