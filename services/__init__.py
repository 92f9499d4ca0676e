"""What you start: the command line, vLLM, the gateway, the report. The only package that composes the others."""
