"""Statistics of depthwise filters: their covariance, a closed form for it, and how both carry over."""
