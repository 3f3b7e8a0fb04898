"""The native backend: lexmill's own engine, and what decides which tokens it computes next. Free of torch."""
