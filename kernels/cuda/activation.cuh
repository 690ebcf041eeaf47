// The functions that the expressions of gpu_bn/activations.py know. The struct Activation is made from them.

// Not a function, which would compute both: some kernels have no registers left for that.
#define where(condition, then, otherwise) ((condition) ? (then) : (otherwise))

template <class A> DEVICE A sigmoid(A z) { return A(1) / (A(1) + exp(-z)); }

template <class A> DEVICE A sigmoid_slope(A z) {
  const A tail = exp(-fabs(z));
  return tail / ((A(1) + tail) * (A(1) + tail));
}

DEVICE float normal_cdf(float z) { return normcdff(z); }
DEVICE double normal_cdf(double z) { return normcdf(z); }
