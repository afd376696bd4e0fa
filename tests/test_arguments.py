"""Messages name arguments in Python and options on the command line; what stands in backticks is a command."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import attnlens
from attnlens.arguments import FLAGS, NAMES, NOT_OURS, as_options, in_python
from attnlens.errors import UsageError

ROOT = Path(attnlens.__file__).parent
NO_FUNCTION = {"family"}
"""Options of commands that no public function stands behind."""


def messages():
    """Yield every text in the package outside its command line that is no documentation."""
    for path in ROOT.rglob("*.py"):
        if path.name == "arguments.py" or path.parent.name == "cli":
            continue
        tree = ast.parse(path.read_text())
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                yield re.sub(r"`[^`]*`", "", node.value)


def test_every_option_that_a_message_names_is_an_argument_of_a_public_function():
    named = {name for text in messages() for name in re.findall(r"(?<![\w-])--([a-z][a-z-]*)", text)}
    named -= {"include-"}  # a kind of attention ends it: both stand in FLAGS
    assert len(named) > 40
    functions = [value for name in attnlens.__all__ if inspect.isfunction(value := getattr(attnlens, name))]
    known = {name for function in functions for name in inspect.signature(function).parameters}
    arguments = {text.partition("=")[0] for text in FLAGS.values()}
    arguments |= {NAMES.get(name, name.replace("-", "_")) for name in named - set(FLAGS) - NOT_OURS - NO_FUNCTION}
    assert arguments <= known, arguments - known


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("--num-heads 0 is not a number of heads", "num_heads=0 is not a number of heads"),
        ("--num-heads 'x' is not a number", "num_heads='x' is not a number"),
        ("--row-order goes with --num-heads: a", "row_order goes with num_heads: a"),
        ("Add --row-order head,dim,qkv, or --row-order a,b to", "Add row_order='head,dim,qkv', or row_order='a,b' to"),
        ("--offline and --remote exclude each other", "offline=True and remote=True exclude each other"),
        (
            "Add --row-order 4,qvk,head,dim, or try --lr 1e-3 and --stack 2 (same)",
            "Add row_order='4,qvk,head,dim', or try lr=1e-3 and stack=2 (same)",
        ),
        ("use --fold raw", "use fold='raw'"),
        ("--device cuda: none is found. Use --device cpu", "device='cuda': none is found. Use device='cpu'"),
        ("--precision half is not known", "precision half is not known"),
        ("add --model-arg num_heads=N, or", "add model_args={'num_heads': N}, or"),
        ("name MODEL and --checkpoint FILE", "name model and checkpoint=FILE"),
        ("a.pt and --checkpoint b.pt are both files", "a.pt and checkpoint b.pt are both files"),
        ("run `attnlens inspect MODEL --json` again", "run `attnlens inspect MODEL --json` again"),
        ("leave --resume out, or use --no-compile", "leave resume=True out, or use compiled=False"),
        ("Pass --include-channel to see it", "Pass include='channel' to see it"),
        ("torchrun: pass --nproc-per-node 2", "torchrun: pass --nproc-per-node 2"),
        ("as in --dataset text:FILE", "as in dataset='text:FILE'"),
        ("a model--with dashes and a MODELS", "a model--with dashes and a MODELS"),
    ],
)
def test_an_option_in_a_sentence_becomes_an_argument(option, argument):
    assert in_python(option) == argument
    assert str(UsageError(option)) == argument
    with as_options():
        assert str(UsageError(option)) == option
    assert str(UsageError(option)) == argument


def test_one_mistake_is_told_to_each_caller_in_its_own_words(run):
    with pytest.raises(UsageError, match=r"^offline=True and remote=True exclude each other: choose one$"):
        attnlens.inspect(offline=True, remote=True)
    told = run("inspect", "--offline", "--remote").err
    assert told == "attnlens: --offline and --remote exclude each other: choose one\n"
    with pytest.raises(UsageError, match=r"^num_heads=0 is not a number of heads"):
        attnlens.inspect(num_heads=0)


def test_an_error_inside_an_error_is_told_in_the_same_words():
    def nested():
        raise UsageError(f"nothing is there: {UsageError('pass --checkpoint FILE')}")

    with pytest.raises(UsageError, match=r"^nothing is there: pass checkpoint=FILE$"):
        nested()
    with as_options(), pytest.raises(UsageError) as caught:
        nested()
    assert caught.value.args == ("nothing is there: pass --checkpoint FILE",)
