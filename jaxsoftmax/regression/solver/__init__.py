"""The solvers of softmax regression.

`_newton` has Newton's method, as `init`, `step` and `result` over the state of `_state`. A step is
a phase of `_line_search`, `_verdict` or `_direction`, whose passes over the examples are in
`_kernels`. `_drivers` runs the steps in a Python loop or a compiled one, and `_vmapped` chooses
between them. `_certificate`, `_cg` and `_preconditioner` are the mathematics of a phase, `_model`
sets up problems, `_implicit` differentiates an optimum, `_lbfgs` is the reference.
"""
