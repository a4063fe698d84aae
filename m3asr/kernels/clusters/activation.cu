DEVICE float activate(float v) {
#if SWISH
    return v * sigmoid(v);
#else
    return fmaxf(v, 0.0f);
#endif
}

