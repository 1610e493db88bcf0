"""Build time: which kernels exist (catalogue), what they may be (rules), their sources (emit) and library (build)."""
