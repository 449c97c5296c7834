from .pipeline_ddpm_sr import DDPMSRPipeline
from .pipeline_flow_match import FlowMatchPipeline
from .pipeline_flow_match_sr import FlowMatchSRPipeline

__all__ = ["DDPMSRPipeline", "FlowMatchPipeline", "FlowMatchSRPipeline"]
