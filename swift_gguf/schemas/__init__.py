"""JSON Schema held while sampling: a schema becomes a mask over the vocabulary, token by token.

`constraint` says what an answer must be, `matching` holds it to that.  llguidance makes masks of
schemas; what it cannot hold, or holds too loosely, `writing` says in other words or refuses.
"""
