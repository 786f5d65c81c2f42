"""GetPlan: what residency decided, for whom and why, and what waits now."""

from __future__ import annotations

import grpc.aio

from lmd.daemon.residency.decisions import Decision
from lmd.daemon.residency.plans import Action
from lmd.daemon.services.answers import duration
from lmd.daemon.services.devices import RuntimeDevicesServicer
from lmd.v1 import runtime_service_pb2 as pb

_ACTIONS = {
    Action.LOAD: pb.Decision.ACTION_LOAD,
    Action.EVICT: pb.Decision.ACTION_EVICT,
    Action.WAIT: pb.Decision.ACTION_WAIT,
    Action.REFUSE: pb.Decision.ACTION_REFUSE,
    Action.TURN: pb.Decision.ACTION_TURN,
    Action.HOLD: pb.Decision.ACTION_HOLD,
}


class RuntimePlansServicer(RuntimeDevicesServicer):
    """The whole service: runners, memory, devices, and the decisions about them."""

    async def GetPlan(
        self, request: pb.GetPlanRequest, context: grpc.aio.ServicerContext[pb.GetPlanRequest, pb.GetPlanResponse]
    ) -> pb.GetPlanResponse:
        """Return the decisions."""
        return pb.GetPlanResponse(
            waiting=map(decision_message, self._residency.waiting_plans()),
            recent=map(decision_message, self._residency.recent_plans()),
        )


def decision_message(decision: Decision) -> pb.Decision:
    """Return a decision as the API shows it."""
    plan = decision.plan
    message = pb.Decision(
        name=decision.name,
        action=_ACTIONS[plan.action],
        shares=[pb.DeviceShare(device=share.device, bytes=share.bytes) for share in plan.placement.shares],
        others=decision.others,
        reason=plan.reason,
        needed_bytes=plan.needed_bytes,
        waited=duration(round(decision.waited_s * 1e9)),
    )
    message.time.FromDatetime(decision.time)
    return message
