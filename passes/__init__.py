"""The graph passes, one a file; installed as ``sp_compile.passes``."""

if __name__ != "sp_compile.passes":
    raise ImportError("import sp_compile.passes: the folder 'passes' is installed under that name")

from sp_compile.passes.draw_by_position import DrawByPosition
from sp_compile.passes.drop_logits import DropLogits
from sp_compile.passes.isolate_requests import IsolateRequests
from sp_compile.passes.localize_shapes import LocalizeShapes
from sp_compile.passes.lower_attention import LowerAttention
from sp_compile.passes.lower_redistributes import LowerRedistributes
from sp_compile.passes.minimize_communication import MinimizeCommunication
from sp_compile.passes.normalize import Normalize
from sp_compile.passes.overlap_communication import OverlapCommunication
from sp_compile.passes.place_gradients import PlaceGradients
from sp_compile.passes.plan_attention import PlanAttention
from sp_compile.passes.propagate_placements import PropagatePlacements
from sp_compile.passes.raise_attention import RaiseAttention
from sp_compile.passes.restore_outputs import RestoreOutputs
from sp_compile.passes.shard_attention import ShardAttention
from sp_compile.passes.shard_cache import ShardCache
from sp_compile.passes.shard_tokens import ShardTokens
from sp_compile.passes.split_losses import SplitLosses

DEFAULT = (
    Normalize,
    SplitLosses,
    DropLogits,
    RaiseAttention,
    DrawByPosition,
    IsolateRequests,
    ShardTokens,
    PropagatePlacements,
    ShardAttention,
    ShardCache,
    PlanAttention,
    RestoreOutputs,
    MinimizeCommunication,
    LowerRedistributes,
    PlaceGradients,
    LocalizeShapes,
    LowerAttention,
    OverlapCommunication,
)
