from .scheduling_flow_match_sr_euler import FlowMatchSREulerScheduler

__all__ = ["FlowMatchSREulerScheduler"]
