"""The benchmark of each op as data: shapes, operations, bytes and peers."""
