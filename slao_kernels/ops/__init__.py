"""The four operations. Each folder: the public function, its reference, and one module a backend."""
