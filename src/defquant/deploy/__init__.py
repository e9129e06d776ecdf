"""Ship it: integer ONNX models, their parity with the trained network, and what they cost."""
