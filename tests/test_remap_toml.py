import pytest

from shardkit.checkpoint.remap import Remap, load_rules
from shardkit.checkpoint.remap_ops import (
    Average,
    Cast,
    Drop,
    Fuse,
    Init,
    Pad,
    Reshape,
    Slice,
    Split,
    Stack,
    Transpose,
    Unpad,
    Unstack,
)
from shardkit.checkpoint.rules import Rule
from shardkit.errors import ConfigError

GOOD = """
keep_rest = true
follow = ["opt_state"]

[[rule]]
from = "params/layers/{i}/attention/{which}/kernel"
to = "params/layers/attention/{which}/kernel"
ops = [{ op = "stack", over = "i", dim = 0 }, { op = "transpose", dims = [1, 0, 2] }]

[[rule]]
from = ["a", "b"]
to = "c"
ops = [{ op = "average", weights = [1, 2.5] }]
"""


def test_toml_says_what_python_says():
    remap = Remap.from_toml(GOOD)
    assert remap == Remap(
        [
            Rule(
                "params/layers/{i}/attention/{which}/kernel",
                "params/layers/attention/{which}/kernel",
                Stack("i"),
                Transpose(1, 0, 2),
            ),
            Rule(["a", "b"], "c", Average(weights=[1, 2.5])),
        ],
        keep_rest=True,
        follow=["opt_state"],
    )
    assert Remap.from_toml(remap.to_toml()) == remap


def test_every_operation_survives_toml():
    ops = [
        *(Transpose(1, 0), Reshape(-1, 2, was=(2, 2)), Fuse(0, (1, 2)), Slice(0, 1, 2)),
        *(Pad(0, 9, 0.5, -1.0, 3), Unpad(0, 3), Cast("int4", moments=True, was="int8")),
    ]
    rules = [Rule('a"\\{x}é', "b/{x}", op) for op in ops if not op.gathers]
    rules += [
        Rule(["a", "b"], "c", ops[2]),
        Rule("c", ["a", "b"], Split(0, sizes=[1, 2])),
        Rule("c", ["a", "b"], Unstack(dim=1)),
        Rule("c/{i}", "c", Average("i", (1e20, 1e-7))),
        Rule((), "n", Init(scale=1e-3, seed=4, shape=(2,), dtype="bfloat16")),
        Rule((), "n", Init(value=float("-inf"))),
        Rule("o", (), Drop()),
    ]
    remap = Remap(rules, root="", allow=["x/{y...}"])
    assert Remap.from_toml(remap.to_toml()) == remap


def rule_with(ops="[]", frm='"a/{x}"', to='"b/{x}"'):
    return f"[[rule]]\nfrom = {frm}\nto = {to}\nops = {ops}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[rule", "not TOML"),
        ("rule = 3", "two brackets"),
        ("rule = [3]", "rule 1  expected .*found 3"),
        ("keep = true", "keep: there is no such key.*Did you mean keep_rest"),
        ("keep_rest = 1", "keep_rest: expected true or false, found 1"),
        ('follow = "ema"', "follow: expected a list of texts, found 'ema'"),
        ("[[rule]]", "found neither"),
        ('[[rule]]\nfrm = "a"', "frm: there is no such key.*Did you mean from"),
        (rule_with(frm="3"), "from: expected a list of texts, found 3"),
        (rule_with(ops="3"), "ops: expected a list"),
        (rule_with(ops="[3]"), "ops: expected {op"),
        (rule_with(ops="[{dim = 3}]"), "ops: expected {op"),
        (rule_with('[{op = "transpos"}]'), "found 'transpos'. Did you mean transpose"),
        (rule_with('[{op = "transpose"}]'), "op transpose: dims is missing"),
        (rule_with('[{op = "transpose", dims = 1}]'), "dims: expected a list of whole"),
        (rule_with('[{op = "transpose", dims = [0.5]}]'), "a list of whole numbers"),
        (rule_with('[{op = "transpose", dims = [true]}]'), "a list of whole numbers"),
        (rule_with('[{op = "stack", ovr = "i"}]'), "ovr: .*Did you mean over"),
        (rule_with('[{op = "pad", dim = 0}]'), "op pad: size is missing"),
        (rule_with('[{op = "pad", dim = "0", size = 1}]'), "a whole number, found '0'"),
        (rule_with('[{op = "cast", dtype = "int3"}]'), "name of a dtype"),
        (rule_with('[{op = "cast", dtype = 3}]'), "dtype: expected text"),
        (rule_with(to='"b/{y}"'), "{x} is in the sources alone"),
        (rule_with(to='"b/{y"'), "a brace"),
    ],
)
def test_bad_toml_gives_one_clear_error(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Remap.from_toml(text, "rules.toml")
    assert str(caught.value).startswith("rules.toml: ")


def test_rules_are_read_from_a_file(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text("keep_rest = true")
    assert load_rules(file) == Remap([], keep_rest=True)
    file.write_text("keep_rest = 1")
    with pytest.raises(ConfigError, match=r"rules.toml: 1 entry is wrong"):
        load_rules(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_rules(tmp_path / "none")


def test_all_bad_rules_are_named_at_once():
    text = "keep = 1\n" + rule_with() + rule_with("3") + rule_with(to='"c"')
    with pytest.raises(ConfigError) as caught:
        Remap.from_toml(text)
    message = str(caught.value)
    assert "3 entries are wrong" in message
    assert "rule 1 " not in message
    assert "rule 2 " in message
    assert "rule 3 " in message
