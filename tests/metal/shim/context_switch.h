// Switches between the stacks of fibers: saves the registers that a function
// call preserves on the current stack, and goes on where another stack left
// off.

#pragma once

#ifdef __APPLE__
#define MSL_SYMBOL(name) "_" #name
#else
#define MSL_SYMBOL(name) #name
#endif

extern "C" void msl_switch(void** saved_stack, void* next_stack);

#if defined(__x86_64__)

// clang-format off
__asm__(
    ".text\n.globl " MSL_SYMBOL(msl_switch) "\n"
    MSL_SYMBOL(msl_switch) ":\n"
    "pushq %rbp\n pushq %rbx\n"
    "pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n"
    "popq %rbx\n popq %rbp\n"
    "ret\n");
// clang-format on

// A stack that starts `entry` when it is first switched to.
static inline void* msl_new_stack(void* top, void (*entry)()) {
  void** stack =
      reinterpret_cast<void**>(reinterpret_cast<unsigned long>(top) & ~15ul);
  *--stack = nullptr; // in place of entry's return address: keeps the alignment
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) { // the registers that msl_switch restores
    *--stack = nullptr;
  }
  return stack;
}

#elif defined(__aarch64__)

// clang-format off
__asm__(
    ".text\n.globl " MSL_SYMBOL(msl_switch) "\n"
    ".balign 4\n"
    MSL_SYMBOL(msl_switch) ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n"
    "stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
    "mov x9, sp\n str x9, [x0]\n"
    "mov sp, x1\n"
    "ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n"
    "ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\n"
    "ret\n");
// clang-format on

static inline void* msl_new_stack(void* top, void (*entry)()) {
  void** stack =
      reinterpret_cast<void**>(reinterpret_cast<unsigned long>(top) & ~15ul);
  stack -= 160 / sizeof(void*);
  for (unsigned i = 0; i < 160 / sizeof(void*); ++i) {
    stack[i] = nullptr;
  }
  stack[11] = reinterpret_cast<void*>(entry); // x30, the return address
  return stack;
}

#else
#error "msl_switch needs a version for this CPU"
#endif
