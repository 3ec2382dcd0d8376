// Runs the code of an artifact without Python: runner CODE.so CALL.txt OUTDIR [REPEATS]
// CALL.txt has one line per argument of main, in order: DTYPE NDIM DIM... FILE OFFSET
// (DTYPE as in numpy; FILE holds raw little-endian values). Each output goes to
// OUTDIR/out<i>.bin and a line "out<i> DTYPE NDIM DIM..." to stdout.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct AlignedAlloc {
  void AllocData(DLTensor* t) {
    if (posix_memalign(&t->data, 64, ffi::GetDataSize(*t)) != 0) throw std::bad_alloc();
  }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

static DLDataType ParseType(const std::string& name) {
  if (name == "bool") return DLDataType{kDLBool, 8, 1};
  size_t digit = name.find_first_of("0123456789");
  if (digit == std::string::npos) throw std::runtime_error("bad dtype " + name);
  std::string kind = name.substr(0, digit);
  uint8_t bits = static_cast<uint8_t>(std::stoi(name.substr(digit)));
  if (kind == "float") return DLDataType{kDLFloat, bits, 1};
  if (kind == "int") return DLDataType{kDLInt, bits, 1};
  if (kind == "uint") return DLDataType{kDLUInt, bits, 1};
  throw std::runtime_error("bad dtype " + name);
}

static std::string TypeName(DLDataType t) {
  if (t.code == kDLBool) return "bool";
  const char* kind = t.code == kDLFloat ? "float" : t.code == kDLInt ? "int" : "uint";
  return kind + std::to_string(t.bits);
}

static ffi::Tensor ReadTensor(const std::string& line) {
  std::istringstream in(line);
  std::string type, file;
  int rank = 0;
  long long offset = 0;
  in >> type >> rank;
  std::vector<int64_t> dims(rank);
  for (auto& d : dims) in >> d;
  in >> file >> offset;
  if (!in) throw std::runtime_error("bad line: " + line);
  ffi::Tensor t = ffi::Tensor::FromNDAlloc(AlignedAlloc(), ffi::Shape(dims.begin(), dims.end()),
                                           ParseType(type), DLDevice{kDLCPU, 0});
  std::ifstream data(file, std::ios::binary);
  data.seekg(offset);
  size_t bytes = ffi::GetDataSize(t);
  data.read(static_cast<char*>(t.data_ptr()), static_cast<std::streamsize>(bytes));
  if (!data) throw std::runtime_error("file too short: " + file);
  return t;
}

static void WriteTensor(const ffi::Tensor& t, int index, const std::string& folder) {
  std::string name = "out" + std::to_string(index);
  std::ofstream data(folder + "/" + name + ".bin", std::ios::binary);
  data.write(static_cast<const char*>(t.data_ptr()),
             static_cast<std::streamsize>(ffi::GetDataSize(t)));
  if (!data) throw std::runtime_error("can not write into " + folder);
  std::cout << name << ' ' << TypeName(t.dtype()) << ' ' << t.ndim();
  for (int i = 0; i < t.ndim(); ++i) std::cout << ' ' << t.size(i);
  std::cout << '\n';
}

static void Run(const std::string& code, const std::string& call, const std::string& folder,
                int repeats) {
  ffi::Module library = ffi::Module::LoadFromFile(code);
  ffi::Module vm =
      library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2);
  ffi::Function entry = vm->GetFunction("main").value();

  std::ifstream lines(call);
  std::vector<ffi::Tensor> tensors;
  for (std::string line; std::getline(lines, line);)
    if (!line.empty()) tensors.push_back(ReadTensor(line));
  std::vector<ffi::AnyView> args(tensors.begin(), tensors.end());

  ffi::Any result;
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    auto start = std::chrono::steady_clock::now();
    entry.CallPacked(args.data(), static_cast<int32_t>(args.size()), &result);
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (took.count() < best) best = took.count();
  }
  if (auto one = result.as<ffi::Tensor>()) {
    WriteTensor(*one, 0, folder);
  } else {
    auto many = result.cast<ffi::Array<ffi::Tensor>>();
    for (size_t i = 0; i < many.size(); ++i) WriteTensor(many[i], static_cast<int>(i), folder);
  }
  std::cerr << "best of " << repeats << ": " << best * 1e3 << " ms\n";
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: runner CODE.so CALL.txt OUTDIR [REPEATS]\n";
    return 2;
  }
  try {
    Run(argv[1], argv[2], argv[3], argc > 4 ? std::atoi(argv[4]) : 1);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
