from dataclasses import dataclass, field

import pytest

from consistency_lens.cli.parser import parse_arguments


@dataclass
class Arguments:
    layer: int = 0
    rate: float = 1.0
    name: str = ""
    stages: list[str] = field(default_factory=lambda: ["a"])
    flag: bool = False
    num_rows: int = 0


def parse(tmp_path, yaml, *flags):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml)
    return parse_arguments((Arguments,), ["--config", str(path), *flags])[0]


def test_a_file_sets_and_a_flag_wins(tmp_path):
    result = parse(tmp_path, "layer: 2\nrate: 1e-3\nstages: [x 60%, y]\nflag: true\n", "--layer", "5", "--name", "n")
    assert result == Arguments(layer=5, rate=1e-3, name="n", stages=["x 60%", "y"], flag=True)


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'layr'; did you mean 'layer'"):
        parse(tmp_path, "layr: 2\n")


def test_a_missing_file_is_an_error():
    with pytest.raises(ValueError, match="no file at"):
        parse_arguments((Arguments,), ["--config", "nowhere.yaml"])


def test_a_file_that_is_no_mapping_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="key: value"):
        parse(tmp_path, "- a\n- b\n")


def test_config_may_be_given_with_an_equals_sign(tmp_path):
    (tmp_path / "recipe.yaml").write_text("layer: 2\n")
    assert parse_arguments((Arguments,), [f"--config={tmp_path / 'recipe.yaml'}"])[0].layer == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "3"], "--layers: unknown; did you mean --layer?"),
        (["--lay", "3"], "--lay: unknown; did you mean --layer?"),
        (["--name=a", "--ratee=2"], "--ratee: unknown; did you mean --rate?"),
        (["--zzzzzz"], "--zzzzzz: unknown; see --help"),
        (["stray"], "'stray': belongs to no flag; put one before it, or quote a value that has spaces"),
        (["--layer", "x"], "--layer: invalid int value: 'x'; see --help"),
        (["--layer"], "--layer: expected one argument; see --help"),
        (["--num_rows", "x"], "--num_rows: invalid int value: 'x'; see --help"),
    ],
)
def test_a_flag_that_cannot_be_read_is_an_error_of_one_line(capsys, flags, message):
    with pytest.raises(ValueError) as raised:
        parse_arguments((Arguments,), flags)
    assert str(raised.value) == message
    assert capsys.readouterr() == ("", "")


def test_a_value_in_a_file_that_cannot_be_read_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ValueError, match="^--layer: invalid int value: 'x'; see --help$"):
        parse(tmp_path, "layer: x\n")


def test_an_unknown_flag_is_named_before_what_the_arguments_check():
    @dataclass
    class Checked:
        layer: int = 0

        def __post_init__(self):
            raise ValueError("layer: got none")

    with pytest.raises(ValueError, match="did you mean --layer"):
        parse_arguments((Checked,), ["--layers", "3"])


def test_the_first_argument_may_stand_without_its_flag():
    assert parse_arguments((Arguments,), ["Once upon", "--layer", "2"], first="name")[0] == Arguments(
        2, name="Once upon"
    )
    assert parse_arguments((Arguments,), ["--name=-x"], first="name")[0].name == "-x"
    with pytest.raises(ValueError, match="'more': belongs to no flag"):
        parse_arguments((Arguments,), ["Once", "more"], first="name")
