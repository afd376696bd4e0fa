"""Networks that a file's arguments describe: built within a stated time and memory, whatever the constructor does."""

import os
import time

import pytest
import timm
from timm.models import register_model

from attnlens.errors import AttnlensError, ModelNotFoundError
from attnlens.models import bounded
from attnlens.models.architecture import build
from attnlens.models.bounded import check_cheap, describe_bounded


def test_another_process_describes_what_this_one_does():
    arguments = {"img_size": 96, "embed_dim": 66, "depth": 3, "num_heads": 6}
    assert describe_bounded("vit_tiny_patch16_224", arguments) == build("vit_tiny_patch16_224", arguments)


def test_a_constructor_that_works_for_minutes_is_one_line_in_seconds():
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"cannot build maxvit_tiny_tf_224 .* within 5 processor seconds"):
        describe_bounded("maxvit_tiny_tf_224", {"img_size": 65536})
    assert time.monotonic() - start < 60  # by the clock, on a machine with other work
    assert describe_bounded("vit_tiny_patch16_224", {"depth": 2}).name == "vit_tiny_patch16_224"


def test_what_takes_long_to_build_is_not_built_in_this_process():
    check_cheap("vit_tiny_patch16_224", {"depth": 2})
    with pytest.raises(ModelNotFoundError):
        check_cheap("maxvit_tiny_tf_224", {"img_size": 65536})


@pytest.mark.parametrize("arguments", [{"depth": "many"}, {"nothing": 1}, {"patch_size": 0}])
def test_arguments_that_cannot_be_are_told_as_in_this_process(arguments):
    with pytest.raises(AttnlensError) as here:
        build("vit_tiny_patch16_224", arguments)
    with pytest.raises(type(here.value)) as there:
        describe_bounded("vit_tiny_patch16_224", arguments)
    assert str(there.value) == str(here.value)


def test_a_process_that_was_killed_is_started_again():
    describe_bounded("vit_tiny_patch16_224", {"depth": 2})
    os.kill(bounded._started[0]._process.pid, 9)
    assert len(describe_bounded("vit_tiny_patch16_224", {"depth": 3}).specs) == 3


def test_processes_forked_from_this_one_get_their_own_answers():
    describe_bounded("vit_tiny_patch16_224", {"depth": 2})
    children = []
    for depth in (2, 3, 4):
        child = os.fork()
        if not child:
            right = [len(describe_bounded("vit_tiny_patch16_224", {"depth": depth}).specs) == depth for _ in range(3)]
            os._exit(0 if all(right) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_model_that_only_this_process_knows_is_built_here():
    @register_model
    def mine_of_this_test(pretrained=False, **kwargs):
        return timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **kwargs)

    assert len(describe_bounded("mine_of_this_test", {"depth": 2}).specs) == 2
