"""x"""
class TritonTiles: pass
def require_triton(d): pass
