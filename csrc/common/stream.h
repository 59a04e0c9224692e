// CUDA's stream, where its headers are not included. Every op's header declares for each of its parameter structs
//   int64_t queue(const Parameters& a, void* memory, Stream stream);
// on a GPU: returns the bytes of working memory that it needs, and with memory also queues the work on the stream.
#pragma once

struct CUstream_st;

namespace autohdr {

using Stream = CUstream_st*;

}  // namespace autohdr
