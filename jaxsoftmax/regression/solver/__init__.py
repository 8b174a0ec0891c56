"""The solvers of softmax regression."""
