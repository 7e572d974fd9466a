// Errors on the way to ONNX Runtime, which passes an OrtStatus from hand to hand: null means success.
#ifndef NM_ORT_STATUS_H_
#define NM_ORT_STATUS_H_

#include "ort_abi.h"

#define NM_RETURN_IF_ERROR(expression)                           \
  do {                                                           \
    if (OrtStatus* nm_status_ = (expression)) return nm_status_; \
  } while (false)

#endif  // NM_ORT_STATUS_H_
