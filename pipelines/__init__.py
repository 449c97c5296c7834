from .pipeline_flow_match_sr import FlowMatchSRPipeline

__all__ = ["FlowMatchSRPipeline"]
