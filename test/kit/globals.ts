// What `await using` needs when both a test and a disposal fail; without it the reasons of both are lost. Node has it, the realm that tests run in has not.
class SuppressedError extends Error {
  readonly error: unknown
  readonly suppressed: unknown

  constructor(error: unknown, suppressed: unknown, message = '') {
    super(`${message}${message === '' ? '' : ': '}${String(error)}; it hides: ${String(suppressed)}`)
    this.error = error
    this.suppressed = suppressed
  }
}

// By its second name, too: swc declares a helper under another name than it calls it by, where a file has many blocks.
Object.assign(globalThis, { SuppressedError, _SuppressedError: SuppressedError })
