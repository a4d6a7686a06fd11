// A process without Python that serves an exported model, TorchScript or an AOTInductor package.
//
//   serve MODEL INPUTS [LIBRARY...] < tensors
//
// MODEL is a .pt of torch.jit.save or a .pt2 of torch._inductor.aoti_compile_and_package; LIBRARY are
// those with the operators that it has: libcce_lookup (the fused lookup), or FBGEMM's (the portable
// one). INPUTS are the types of the model's inputs, i for int64 and f for float32, each with its
// number of dimensions: "i1,i1" for values and lengths, "f2,i1,i1" for a DLRM. The tensors come as
// text: the sizes of one, then its values. The output is printed likewise.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <iostream>
#include <sstream>
#include <string>
#include <vector>

static torch::Tensor read(char type, int64_t dims) {
  std::vector<int64_t> sizes(dims);
  for (auto &size : sizes)
    if (!(std::cin >> size)) throw std::runtime_error("the input ends before its tensors do");
  torch::Tensor out = torch::empty(sizes, type == 'i' ? torch::kLong : torch::kFloat);
  for (int64_t i = 0; i < out.numel(); i++) {
    if (type == 'i') std::cin >> out.data_ptr<int64_t>()[i];
    else std::cin >> out.data_ptr<float>()[i];
    if (!std::cin) throw std::runtime_error("the input ends before its tensors do");
  }
  return out;
}

static torch::Tensor run(const std::string &model, const std::vector<torch::Tensor> &inputs) {
  const bool package = model.size() > 4 && model.substr(model.size() - 4) == ".pt2";
  if (package) {
    torch::inductor::AOTIModelPackageLoader loaded(model);
    return loaded.run(inputs)[0];
  }
  torch::jit::Module loaded = torch::jit::load(model);
  loaded.eval();
  return loaded.forward({inputs.begin(), inputs.end()}).toTensor();
}

int main(int argc, char **argv) try {
  if (argc < 3) throw std::runtime_error("usage: serve MODEL INPUTS [LIBRARY...] < tensors");
  for (int i = 3; i < argc; i++)
    if (!dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  c10::InferenceMode no_gradients;
  std::vector<torch::Tensor> inputs;
  std::stringstream types(argv[2]);
  for (std::string type; std::getline(types, type, ',');)
    inputs.push_back(read(type[0], std::stoll(type.substr(1))));
  const torch::Tensor out = run(argv[1], inputs).contiguous();
  for (const int64_t size : out.sizes()) std::cout << size << ' ';
  std::cout << '\n';
  std::cout.precision(9);
  for (int64_t i = 0; i < out.numel(); i++) std::cout << out.data_ptr<float>()[i] << '\n';
} catch (const std::exception &error) {
  std::cerr << error.what() << '\n';
  return 1;
}
