"""What you start: the command line, the vLLM launcher, the gateway, the report. The only package that composes the others."""
