// The functions that the expressions of gpu_bn/activations.py call. gpu_bn/backends/cupy/sources.py appends the struct
// Activation, which it builds from the expressions of one activation.

// A macro, because a function would compute both values, for which some kernels have no registers left.
#define where(condition, then, otherwise) ((condition) ? (then) : (otherwise))

// 1 / (1 + exp(-z))
template <class A> DEVICE A sigmoid(A z) { return A(1) / (A(1) + exp(-z)); }

// sigmoid(z) * (1 - sigmoid(z)), of which no part overflows
template <class A> DEVICE A sigmoid_slope(A z) {
  const A tail = exp(-fabs(z));
  return tail / ((A(1) + tail) * (A(1) + tail));
}

// The probability that a standard normal number is below z
DEVICE float normal_cdf(float z) { return normcdff(z); }
DEVICE double normal_cdf(double z) { return normcdf(z); }
