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
    numbers: list[int] = field(default_factory=list)
    limit: int | None = 3
    settings: dict[str, int] | str | None = None
    report_to: None | str | list[str] = None


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


@pytest.mark.parametrize(
    ("yaml", "name", "value"),
    [
        ("stages: x 60%", "stages", ["x 60%"]),
        ("stages: [1, 2]", "stages", ["1", "2"]),
        ("stages: {prompts: 1e-3, last: }", "stages", ["prompts 1e-3", "last"]),
        ("numbers: 2", "numbers", [2]),
        ("numbers: [1, '2']", "numbers", [1, 2]),
        ("limit: ", "limit", None),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("settings: {a: 1}", "settings", {"a": 1}),
        ("report_to: [a, b]", "report_to", ["a", "b"]),
        ("report_to: a", "report_to", "a"),
    ],
)
def test_a_value_in_a_file_is_read_as_its_flag_would_be(tmp_path, yaml, name, value):
    assert getattr(parse(tmp_path, yaml), name) == value


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("layer: [1, 2]", "layer takes one value, got a list: [1, 2]"),
        ("layer: {a: 1}", "layer takes one value, got a mapping: {'a': 1}"),
        ("layer: true", "layer must be a number, got True"),
        ("layer: ", "layer has no value; give it one, or remove the line"),
        ("name: [a]", "name takes one value, got a list"),
        ("flag: [true]", "flag takes one value, got a list"),
        ("stages: ", "stages has no value"),
        ("stages: [[a]]", r"stages takes a list of single values, got \['a'\] in it"),
        ("numbers: [true]", "numbers takes a list of single values, got True in it"),
        ("numbers: [x]", r"numbers takes numbers \(int\), got x"),
        ("layer: 1\nlayer: 2", "has the key 'layer' twice; remove one"),
    ],
)
def test_a_value_in_a_file_of_another_kind_is_an_error_of_one_line(tmp_path, yaml, message):
    message = message.replace("[1, 2]", r"\[1, 2\]").replace("{'a': 1}", r"\{'a': 1\}")
    with pytest.raises(ValueError, match=f"^--config: .*{message}") as raised:
        parse(tmp_path, yaml)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: " + b"[" * 3000], ids=["binary", "deep"])
def test_a_file_that_is_no_yaml_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"^--config: .*recipe.yaml' is no YAML: [^\n]*$"):
        parse_arguments((Arguments,), ["--config", str(tmp_path / "recipe.yaml")])
