"""Job files; installed as ``sp_compile.configs``, so that ``sp-compile run prefill`` works from any directory."""
