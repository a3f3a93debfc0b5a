"""What is live in a masked model: taken along, taken over, never revived, and nothing at all."""
import pytest
import torch
from models import UNEVEN, tokens, vit

import vitprune
from vitprune import BlockPruning, PrunedAttention, PrunedMlp, compact, prune

pytestmark = pytest.mark.filterwarnings("ignore:the token predictors are untrained")


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_state_dict_brings_the_choice_of_what_is_live(tmp_path, x):
    """Between masked models; timm's keys are all there is for any other, and weights alone leave a model's own choice."""
    one = prune(vit(), blocks=BlockPruning(0.5, 0.5, granularity=32))
    torch.save(one.state_dict(), tmp_path / "one.pth")
    other = vit()
    for p in other.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    two = prune(other, blocks=BlockPruning(0.25, 0.25))
    assert [b.attn.live.tolist() for b in one.blocks] != [b.attn.live.tolist() for b in two.blocks]
    two.load_state_dict(torch.load(tmp_path / "one.pth", weights_only=True))
    assert torch.equal(two.eval()(x), one.eval()(x)) and not torch.equal(one(x), vit()(x))
    three = prune(vit(), blocks=BlockPruning())
    three.load_state_dict(one.state_dict())
    assert torch.equal(three.eval()(x), one(x))
    two.load_state_dict(dict(three.state_dict()))
    two.load_state_dict(vit().state_dict())
    assert torch.equal(two(x), one(x))
    four = vit()
    four.load_state_dict(one.state_dict())
    torch.testing.assert_close(four(x), vit()(x))
    with pytest.raises(ValueError, match="load_weights: model must have all its heads and hidden units"):
        vitprune.load_weights(two, vit().state_dict())


def test_what_is_live_is_taken_over_as_far_as_it_fits(x):
    one = prune(vit(), blocks=BlockPruning(0.5, 0.5, granularity=32))
    attn, mlp = one.blocks[0].attn, one.blocks[0].mlp
    places = [t.data_ptr() for t in (attn.live, attn.live_qkv, mlp.live)]
    one.load_state_dict(one.state_dict())
    assert places == [t.data_ptr() for t in (attn.live, attn.live_qkv, mlp.live)]  # a CUDA graph reads them there
    two = prune(vit(), blocks=BlockPruning(0.5, 0.5, granularity=32))
    two.load_state_dict(prune(vit(), blocks=BlockPruning()).state_dict())
    torch.testing.assert_close(two.eval()(x), vit()(x))  # nothing is dead in the other one
    before = one.eval()(x)
    for other in (compact(one), prune(vit(num_heads=8), blocks=BlockPruning(0.9, 0.5, granularity=32))):
        with pytest.raises(RuntimeError, match="Error.s. in loading state_dict"):
            one.load_state_dict(other.state_dict())
        assert attn.live.tolist() == list(attn._live_ids) and attn.live_heads == 2 and torch.equal(one(x), before)
    empty = prune(vit(), blocks=BlockPruning(0.25, 0.25)).to("meta")
    empty.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x), one(x))
    learning = prune(vit(), blocks=BlockPruning(0.5, 0.5, granularity=32, method="movement"))
    learning.load_state_dict(one.state_dict(), strict=False)
    assert learning.blocks[0].mlp.width == 32 and learning.blocks[0].attn.live is None
    torch.testing.assert_close(learning.eval()(x), vit()(x))


def test_a_trace_with_gradients_needs_nothing_of_this_package(x):
    for model in (prune(vit(), blocks=UNEVEN), prune(vit(), tokens(score="cls_attention")), prune(vit(), tokens())):
        traced = torch.jit.trace(model.eval(), x)
        assert "vitprune::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("make", [lambda model: model, compact])
def test_a_layer_without_heads_gives_every_parameter_a_gradient(x, make):
    """DDP waits for one; zeros, also for a norm of queries and keys, and for the policy."""
    model = make(prune(vit(qk_norm=True), tokens(), BlockPruning(heads=[0, 1, 1, 1], hidden=[0, 1, 1, 1]))).train()
    model(x).square().sum().backward()
    attn = model.blocks[0].attn
    assert attn.live_heads == 0 and all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in (*attn.q_norm.parameters(), *attn.k_norm.parameters()))
    policy = torch.ones(2, 5, requires_grad=True)
    y = attn.bfloat16()(torch.randn(2, 5, attn.proj.out_features).bfloat16(), policy=policy)
    assert y.dtype == torch.bfloat16 and not torch.autograd.grad(y.sum(), policy)[0].any()


def test_live_may_be_any_iterable():
    assert PrunedAttention(64, num_heads=4, live=iter([0, 2])).live.tolist() == [0, 2]
    assert PrunedMlp(64, hidden_features=256, live=filter(None, [1])).live.tolist() == [1]


def test_modules_that_are_masked_are_not_revived(x):
    model = vit(attn_layer=PrunedAttention, mlp_layer=PrunedMlp)
    model.blocks[1].attn.set_live([0])
    torch.testing.assert_close(prune(model, tokens(1.0, score="random"))(x), model(x))
    with pytest.raises(ValueError, match="prune: blocks must be None for a model whose blocks are masked"):
        prune(model, blocks=BlockPruning())
