"""JSON Schema during sampling: before each token, a mask rules out the tokens that do not fit.

`constraint` compiles a schema, and `matching` applies it to an answer.  llguidance computes the
masks.  `writing` translates what llguidance does not support or checks too loosely, or refuses it.
"""
