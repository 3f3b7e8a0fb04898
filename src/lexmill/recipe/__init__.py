"""The whole life of a model as cached steps: plan, run, resume, report."""
