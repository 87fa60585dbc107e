import { createPrivateKey, createPublicKey, webcrypto } from 'node:crypto'
import { CdpError } from '../errors/index.ts'
import { loadX509 } from './x509-library.ts'

/** ECDSA P-256, as PEM (PKCS #8 and SPKI): plain text, so that it can be stored and handed to worker threads. */
export type KeyPair = { privateKeyPem: string; publicKeyPem: string }

export const keyAlgorithm = { name: 'ECDSA', namedCurve: 'P-256' } as const
export const signingAlgorithm = { name: 'ECDSA', hash: 'SHA-256' } as const

export const createKeyPair = async (): Promise<KeyPair> => {
  const pair = await webcrypto.subtle.generateKey(keyAlgorithm, true, ['sign', 'verify'])
  return {
    privateKeyPem: pem('PRIVATE KEY', await webcrypto.subtle.exportKey('pkcs8', pair.privateKey)),
    publicKeyPem: pem('PUBLIC KEY', await webcrypto.subtle.exportKey('spki', pair.publicKey)),
  }
}

export const publicKeyOf = (privateKeyPem: string): string =>
  createPublicKey(createPrivateKey(privateKeyPem)).export({ type: 'spki', format: 'pem' }).toString()

const nameShape = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/

/** Site ids and host names, as they may stand in a certificate's CN. Throws BAD_INPUT. */
export const checkCommonName = (commonName: string): string => {
  if (!nameShape.test(commonName)) {
    throw new CdpError('BAD_INPUT', `"${commonName.slice(0, 80)}" cannot be the name in a certificate`, {
      hint: 'Use up to 64 letters, digits, dots, dashes and underscores.',
    })
  }
  return commonName
}

/** A certificate signing request (PKCS #10, PEM), signed by the key it is for. */
export const createCsr = async (options: { commonName: string; keyPair: KeyPair }): Promise<string> => {
  const x509 = await loadX509()
  const csr = await x509.Pkcs10CertificateRequestGenerator.create(
    {
      name: [{ CN: [checkCommonName(options.commonName)] }],
      signingAlgorithm,
      keys: { privateKey: await importPrivateKey(options.keyPair.privateKeyPem), publicKey: await importPublicKey(options.keyPair.publicKeyPem) },
    },
    webcrypto,
  )
  return `${csr.toString('pem')}\n`
}

/** What a request asks for, after its signature was verified. Throws BAD_INPUT for anything but a well-formed P-256 request. */
export const verifyCsr = async (csrPem: string): Promise<{ commonName: string; publicKeyPem: string }> => {
  const refuse = (what: string, cause?: unknown): CdpError =>
    new CdpError('BAD_INPUT', `the certificate signing request ${what}`, cause === undefined ? {} : { cause })
  if (csrPem.length > 8192) throw refuse('is longer than 8 KiB')
  const x509 = await loadX509()
  let commonName: string | undefined
  let publicKeyPem: string
  try {
    const csr = new x509.Pkcs10CertificateRequest(csrPem)
    const key = createPublicKey({ key: Buffer.from(csr.publicKey.rawData), format: 'der', type: 'spki' })
    if (key.asymmetricKeyType !== 'ec' || key.asymmetricKeyDetails?.namedCurve !== 'prime256v1') throw refuse('does not use a P-256 key')
    if (!(await csr.verify(webcrypto))) throw refuse('is not signed by its own key')
    commonName = csr.subjectName.getField('CN')[0]
    publicKeyPem = key.export({ type: 'spki', format: 'pem' }).toString()
  } catch (error) {
    throw error instanceof CdpError ? error : refuse('cannot be read', error)
  }
  if (commonName === undefined) throw refuse('names nobody')
  return { commonName: checkCommonName(commonName), publicKeyPem }
}

export const importPrivateKey = (privateKeyPem: string): Promise<webcrypto.CryptoKey> =>
  webcrypto.subtle.importKey('pkcs8', createPrivateKey(privateKeyPem).export({ type: 'pkcs8', format: 'der' }), keyAlgorithm, false, ['sign'])

export const importPublicKey = (publicKeyPem: string): Promise<webcrypto.CryptoKey> =>
  webcrypto.subtle.importKey('spki', createPublicKey(publicKeyPem).export({ type: 'spki', format: 'der' }), keyAlgorithm, true, ['verify'])

const pem = (label: string, der: ArrayBuffer): string => {
  const lines =
    Buffer.from(der)
      .toString('base64')
      .match(/.{1,64}/g) ?? []
  return `-----BEGIN ${label}-----\n${lines.join('\n')}\n-----END ${label}-----\n`
}
